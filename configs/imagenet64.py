"""Transformer-VQ on ImageNet64 as bytes, with the paper's settings: 1.2B parameters.

    python -m tvq_pod.main --config=configs/imagenet64.py --workdir=runs/imagenet64 --source=FOLDER

FOLDER: has the npz files of 64 x 64 images, from image-net.org: train_data_batch_1 to 10 and val_data. The first
1,200,000 images are for training, the other 81,167 for validation, and the official validation images for test. Samples
are PNG files. Needs pip install -e '.[data]'. To see the cost before you rent a slice:

    python -m tvq_pod.main --mode=plan --config=configs/imagenet64.py --topology=v5p:4x4x4 --workdir=runs/imagenet64

It says 0.10 s a step, 1,997,000 tokens/s, and a peak of 6.7 of a chip's 95 GiB.
Settings: arXiv 2309.16354, appendix, and scripts/lm_imagenet64.sh of its code (github.com/transformer-vq).
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.format = "imagenet64"
    config.model.d_model = 2048
    config.model.d_k = 128
    config.model.d_v = 4096
    config.model.n_code = 512
    config.model.block_len = 512
    config.model.mem_len = 512
    config.model.n_layer = 24
    config.model.dtype = "bfloat16"
    config.model.pe_abs = True
    config.model.p_dropsin = 0.1
    config.model.e_tie = True
    config.model.e_norm = True
    config.model.e_scale = 0.005
    config.train.batch_size = 128
    config.train.update_len = 1536
    config.train.num_steps = 500_000
    config.train.log_every_steps = 100
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 0.01  # relative to each matrix's own scale: see docs/optimizer.md
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.clip_norm = 0.0  # Adafactor clips each update by its own size
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 10_000
    config.sample.top_p = 0.999
    config.sample.length = 12_288
    config.sample.count = 16
    return config
