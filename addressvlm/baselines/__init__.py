"""What a user would otherwise pick: AddressCLIP (paper 002), GeoReasoner (003), retrieval, RAG (004); and all of them fused."""
