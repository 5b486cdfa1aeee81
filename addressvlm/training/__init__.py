"""Fine-tuning: trainer, stages, dataset, collator, loss, optimizer, checkpoints. No Ray; uses torch.distributed if started."""
