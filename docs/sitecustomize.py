"""Define the schemas of torchvision's operators, which its wheel can't register with the CPU build of PyTorch, for vLLM.

Copy this file to the site-packages of vLLM's environment (see docs/labels.md). The image models of vLLM call none of these
operators.
"""

import sys

BOXES = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
BACK = "Tensor grad, Tensor rois"
SIZES = "float spatial_scale, int pooled_height, int pooled_width"
SHAPE = "int batch_size, int channels, int height, int width"
STEPS = "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups, int offset_groups"
KERNEL = "Tensor weight, Tensor offset, Tensor mask, Tensor bias"
TWO = "(Tensor, Tensor)"
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"({BOXES}, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward": f"({BACK}, {SIZES}, {SHAPE}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"({BOXES}) -> {TWO}",
    "_roi_pool_backward": f"({BACK}, Tensor argmax, {SIZES}, {SHAPE}) -> Tensor",
    "ps_roi_align": f"({BOXES}, int sampling_ratio) -> {TWO}",
    "_ps_roi_align_backward": f"({BACK}, Tensor channel_mapping, {SIZES}, int sampling_ratio, {SHAPE}) -> Tensor",
    "ps_roi_pool": f"({BOXES}) -> {TWO}",
    "_ps_roi_pool_backward": f"({BACK}, Tensor channel_mapping, {SIZES}, {SHAPE}) -> Tensor",
    "deform_conv2d": f"(Tensor input, {KERNEL}, {STEPS}, bool use_mask) -> Tensor",
    "_deform_conv2d_backward": (
        f"(Tensor grad, Tensor input, {KERNEL}, {STEPS}, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


class BeforeTorchvision:
    """Defines the schemas just before torchvision is imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            for name, schema in SCHEMAS.items():
                torch.library.define(f"torchvision::{name}", schema)


sys.meta_path.insert(0, BeforeTorchvision)
