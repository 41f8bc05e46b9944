"""Transformer-VQ on PG-19 books, with the paper's settings: 1.3B parameters.

    python -m tvq_pod.main --config=configs/pg19.py --workdir=runs/pg19 --source=FOLDER

FOLDER: the release, from github.com/google-deepmind/pg19: train, validation, test and metadata.csv. A SentencePiece BPE
vocabulary of 32,000 pieces is first trained on its training books. Evaluation also reports word perplexity. To see the
cost before you rent a slice:

    python -m tvq_pod.main --mode=plan --config=configs/pg19.py --topology=v5p:4x4x4 --workdir=runs/pg19

It says 0.14 s a step, 1,828,000 tokens/s, and a peak of 8.2 of a chip's 95 GiB.
Settings: arXiv 2309.16354, appendix, and scripts/lm_pg19.sh of its code (github.com/transformer-vq/transformer_vq).
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.format = "pg19"
    config.data.vocab = "sentencepiece"
    config.data.vocab_size = 32_000
    config.model.d_model = 2048
    config.model.d_k = 128
    config.model.d_v = 4096
    config.model.n_code = 512
    config.model.block_len = 512
    config.model.mem_len = 512
    config.model.n_layer = 24
    config.model.n_vocab = 32_000
    config.model.dtype = "bfloat16"
    config.model.p_dropsin = 0.1
    config.model.p_dropres = 0.1
    config.model.p_droplyr = 0.1
    config.model.e_tie = True
    config.model.e_norm = True
    config.model.e_scale = 0.005
    config.train.batch_size = 128
    config.train.update_len = 2048
    config.train.num_steps = 500_000
    config.train.log_every_steps = 100
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 0.01  # relative to each matrix's own scale: see docs/optimizer.md
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.clip_norm = 0.0  # Adafactor clips each update by its own size
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 10_000
    config.sample.top_p = 0.8
    return config
