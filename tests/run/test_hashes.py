"""Fingerprints of arrays."""

import numpy as np

from tvq_pod.run.hashes import sha256_of


def test_a_fingerprint_sees_every_bit_and_every_name():
    tree = dict(a=np.zeros([2, 3], np.float32), b=np.arange(3))
    same = dict(b=np.arange(3), a=np.zeros([2, 3], np.float32))
    assert sha256_of(tree) == sha256_of(same)
    others = [
        tree | dict(a=np.zeros([3, 2], np.float32)),
        tree | dict(a=-np.zeros([2, 3], np.float32)),
        tree | dict(a=np.zeros([2, 3], np.int32)),
        dict(a=tree["a"], c=tree["b"]),
    ]
    assert len({sha256_of(other) for other in [tree, *others]}) == 5
