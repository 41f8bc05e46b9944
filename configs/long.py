"""The enwik8 model with updates of 1,048,576 tokens, which are sharded over 256 chips.

    python -m tvq_pod.main --config=configs/long.py --workdir=runs/long --config.data.source=PATH

PATH: a file or folder with the text. To see the cost before you rent a slice:

    python -m tvq_pod.main --mode=plan --config=configs/long.py --topology=v5e:16x16 --workdir=runs/long

It says 0.09 s a step, 11,187,000 tokens/s, and a peak of 2.5 of a chip's 16 GiB.
"""

from tvq_pod.config import default_config  # and no other config: each file here is read on its own, from any folder


def get_config():
    config = default_config()
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
    config.train.batch_size = 1
    config.train.update_len = 1_048_576
    config.mesh.data = 1
    config.mesh.sequence = 256
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
