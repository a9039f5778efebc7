"""Reads shards with the webdataset package and prints {key: {extension: sha256}} as JSON, or writes a shard.

webdataset_shards.py read SHARD...
webdataset_shards.py write SHARD SAMPLES     sample i: `deep.folder/s00i` with .PNG (i·97 bytes of i), .cls (i mod 7), .seg.png
"""

import hashlib
import json
import sys

import webdataset


def read(shards):
    found = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        key = sample["__key__"]
        assert key not in found, key
        found[key] = {e: hashlib.sha256(v).hexdigest() for e, v in sample.items() if not e.startswith("__")}
    json.dump(found, sys.stdout)


def write(shard, samples):
    with webdataset.TarWriter(shard, encoder=False) as out:
        for i in range(samples):
            key = f"deep.folder/{'long' * 30}/s{i:03}" if i == 0 else f"deep.folder/s{i:03}"
            out.write({"__key__": key, "PNG": bytes([i] * (i * 97)), "cls": str(i % 7).encode(), "seg.png": b"x"})


if sys.argv[1] == "read":
    read(sys.argv[2:])
else:
    write(sys.argv[2], int(sys.argv[3]))
