"""Reads a folder of event files with TensorBoard's own reader and prints the contents as one JSON object."""

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
contents = {"scalars": {}, "images": {}, "file_version": reader.file_version, "modern": {}}
for tag in tags["scalars"]:
    points = reader.Scalars(tag)
    contents["scalars"][tag] = [[p.step, p.value if p.value == p.value else None] for p in points]
for tag in tags["images"]:
    contents["images"][tag] = []
    for image in reader.Images(tag):
        decoded = Image.open(io.BytesIO(image.encoded_image_string))
        contents["images"][tag].append([image.step, image.width, image.height, list(decoded.size), decoded.mode])
# The reader of the current web page converts old-style values into tensors.
for path in sorted(glob.glob(os.path.join(folder, "events.out.tfevents.*"))):
    for event in EventFileLoader(path).Load():
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            contents["modern"].setdefault(value.tag, plugin)
print(json.dumps(contents))
