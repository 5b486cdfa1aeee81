"""For vLLM on CPU torch: torchvision's wheel can't register its operators there, so they get a schema before it is imported.

Copy this file into the site-packages of vLLM's environment (see docs/labels.md). Nothing that vLLM's image models do calls
one of these operators.
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
    """Defines the schemas when torchvision is first looked for; finds nothing itself."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            for name, schema in SCHEMAS.items():
                torch.library.define(f"torchvision::{name}", schema)


sys.meta_path.insert(0, BeforeTorchvision)
