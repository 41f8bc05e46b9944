"""Multi-query associative recall, a task that needs only memory (Zoology, arXiv 2312.04927). A document is a generated
sequence of key-value pairs, so there is nothing to download. The value of a key can be predicted exactly if the key was
seen before in its document, which is as long as 256 windows of attention.

    python -m tvq_pod.main --config=configs/recall.py --workdir=runs/recall
    python -m tvq_pod.main --mode=eval --workdir=runs/recall

Evaluation prints the accuracy of values by distance since their keys were last seen. The same without the cache, with
quadratic attention, and with a few pairs hidden in words:

    python -m tvq_pod.main --config=configs/recall.py --workdir=runs/no_cache --config.model.agg_cache=False
    python -m tvq_pod.main --config=configs/recall.py --workdir=runs/full \\
        --config.model.attn_type=full --config.train.update_len=1024 --config.train.batch_size=2 \\
        --config.train.num_steps=1500 --config.eval.update_len=4112
    python -m tvq_pod.main --config=configs/recall.py --workdir=runs/passkey \\
        --source=passkey --config.data.recall_pairs=4 --config.data.recall_documents=2000

docs/recall.md says what the recipe needs, and how much each part contributes.
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.source = "recall"
    config.data.recall_smaller = 8
    config.data.recall_documents = 100_000  # nine lengths, 72 bytes on average

    config.model.d_model = 128
    config.model.d_k = 64
    config.model.d_v = 128
    config.model.n_layer = 1
    config.model.n_code = 128
    config.model.block_len = 16
    config.model.mem_len = 16
    config.model.key_shift = True
    config.model.temperature = "learned"
    config.model.c_beta = 0.0
    config.model.c_gamma = 0.9
    config.model.c_revive = 0.1
    config.model.remat = "none"

    config.train.batch_size = 16
    config.train.update_len = 128  # eight blocks: gradients reach values in the cache
    config.train.num_steps = 2000
    config.train.log_every_steps = 50
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100

    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 1000
    config.sample.length = 0
    return config
