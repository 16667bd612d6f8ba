"""MXNet's RecordIO as a reference implementation; it runs in a separate environment without the project.

    python mxnet_oracle.py write DIR    DIR/records.json -> DIR/train.rec, DIR/train.idx
    python mxnet_oracle.py read DIR     DIR/train.rec, DIR/train.idx -> DIR/seen.json, DIR/pixels.npz

records.json lists {"key", "labels", "image"}: `labels` a number or a list, `image` in hexadecimal digits.
seen.json has the records that MXNet reads "by_key" with the index, and "in_sequence" without it: lists of
{"key", "flag", "labels", "id", "id2", "image"}, where key is null in the sequence.
pixels.npz has the decoded JPEG images by key, as RGB.
"""

import json
import sys
from pathlib import Path

import mxnet
import numpy as np
from mxnet import recordio


def write(folder):
    """Pack and write the records of records.json with MXNet."""
    writer = recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    for record in json.loads((folder / "records.json").read_text()):
        header = recordio.IRHeader(0, record["labels"], record["key"], 0)
        writer.write_idx(record["key"], recordio.pack(header, bytes.fromhex(record["image"])))
    writer.close()


def read(folder):
    """Read the records with MXNet and dump them."""
    indexed = recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "r")
    sequence = recordio.MXRecordIO(str(folder / "train.rec"), "r")
    by_key = {key: indexed.read_idx(key) for key in indexed.keys}
    seen = {
        "by_key": [describe(payload, key) for key, payload in by_key.items()],
        "in_sequence": [describe(payload, None) for payload in iter(sequence.read, None)],
    }
    (folder / "seen.json").write_text(json.dumps(seen))
    images = {key: recordio.unpack(payload)[1] for key, payload in by_key.items()}
    jpegs = {str(key): image for key, image in images.items() if image.startswith(b"\xff\xd8")}
    np.savez(
        folder / "pixels.npz", **{key: mxnet.image.imdecode(jpeg).asnumpy() for key, jpeg in jpegs.items()}
    )


def describe(payload, key):
    """Return one record as JSON types."""
    header, image = recordio.unpack(payload)
    return {
        "key": key,
        "flag": header.flag,
        "labels": np.atleast_1d(header.label).astype(float).tolist(),
        "id": header.id,
        "id2": header.id2,
        "image": image.hex(),
    }


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
