"""Byte-level Transformer-VQ on enwik8, with the paper's settings: 190M parameters.

    python -m tvq_pod.main --config=configs/enwik8.py --workdir=runs/enwik8 --source=enwik8.zip

enwik8.zip: from mattmahoney.net/dc/textdata, or the file in it; 90 / 5 / 5 million bytes. To see the cost before you
rent a slice:

    python -m tvq_pod.main --mode=plan --config=configs/enwik8.py --topology=v5e:4x4 --workdir=runs/enwik8

It says 0.28 s a step, 944,000 tokens/s, and a peak of 12.2 of a chip's 16 GiB.
Settings: arXiv 2309.16354, appendix, and scripts/lm_enwik8.sh of its code (github.com/transformer-vq/transformer_vq).
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.format = "enwik8"
    config.model.d_model = 768
    config.model.d_k = 128
    config.model.d_v = 1536
    config.model.n_code = 512
    config.model.block_len = 512
    config.model.mem_len = 512
    config.model.n_layer = 24
    config.model.dtype = "bfloat16"
    config.model.p_dropsin = 0.2
    config.model.p_dropres = 0.5
    config.model.p_droplyr = 0.3
    config.model.e_norm = False
    config.train.batch_size = 128
    config.train.update_len = 2048
    config.train.num_steps = 125_000
    config.train.log_every_steps = 100
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.eps = 1e-9
    config.optimizer.weight_decay = 2e-4
    config.optimizer.clip_norm = 0.1
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 10_000
    config.sample.top_p = 0.9
    return config
