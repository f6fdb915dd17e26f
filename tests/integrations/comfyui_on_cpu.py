"""Start ComfyUI with PyTorch's CPU build: `python comfyui_on_cpu.py FOLDER ARGUMENTS…`.

torchvision from PyPI is built for CUDA and doesn't load its operators next to a PyTorch without. ComfyUI imports it
for models that no test runs; all that importing wants is that two operators are declared.
"""

import os
import runpy
import sys

import torch

declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
folder, sys.argv = sys.argv[1], sys.argv[1:]
sys.argv[0] = os.path.join(folder, "main.py")
sys.path[0] = folder
os.chdir(folder)
runpy.run_path(sys.argv[0], run_name="__main__")
