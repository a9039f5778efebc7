"""Reads a folder of event files with TensorBoard's own reader and prints what it saw as one JSON object."""

import glob
import io
import json
import os
import sys

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

folder = sys.argv[1]
reader = EventAccumulator(folder, size_guidance={"scalars": 0, "images": 0})
reader.Reload()
tags = reader.Tags()
seen = {"scalars": {}, "images": {}, "file_version": reader.file_version, "modern": {}}
for tag in tags["scalars"]:
    seen["scalars"][tag] = [[point.step, point.value if point.value == point.value else None] for point in reader.Scalars(tag)]
for tag in tags["images"]:
    seen["images"][tag] = []
    for picture in reader.Images(tag):
        decoded = Image.open(io.BytesIO(picture.encoded_image_string))
        seen["images"][tag].append([picture.step, picture.width, picture.height, list(decoded.size), decoded.mode])
# The reader behind today's web page turns old-style values into tensors on the way.
for path in sorted(glob.glob(os.path.join(folder, "events.out.tfevents.*"))):
    for event in EventFileLoader(path).Load():
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            seen["modern"].setdefault(value.tag, plugin)
print(json.dumps(seen))
