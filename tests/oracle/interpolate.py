"""Positions brought to another grid as the official fine-tuning code does: interpolate.py IN NAME ROWS COLS TO_ROWS TO_COLS
OUT. The first row belongs to the class token and stays."""
import sys

import torch
from safetensors.torch import load_file, save_file

source, name, rows, cols, to_rows, to_cols, out = sys.argv[1:]
table = load_file(source)[name]
grid = table[:, 1:].reshape(1, int(rows), int(cols), -1).permute(0, 3, 1, 2)
size = (int(to_rows), int(to_cols))
grid = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
save_file({"positions": torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1).contiguous()}, out)
