"""Copies a local file to a bucket or a folder: python -m launch.upload FILE TO."""

import sys

from etils import epath

if __name__ == "__main__":
    source, target = map(epath.Path, sys.argv[1:])
    if "://" not in str(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
