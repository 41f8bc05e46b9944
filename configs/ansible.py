"""Text in which memory helps: modules of Ansible, which pip downloads. A module names its options in its documentation,
again in its examples, and again in its code, thousands of tokens apart; the window is much shorter.

    python -m tvq_pod.main --config=configs/ansible.py --workdir=runs/ansible
    python -m tvq_pod.main --mode=eval --workdir=runs/ansible

The same without the cache:

    python -m tvq_pod.main --config=configs/ansible.py --workdir=runs/no_cache --config.model.agg_cache=False

docs/memory.md has the results of three seeds of each.
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.source = "ansible"
    config.data.vocab = "sentencepiece"
    config.data.vocab_size = 1024
    config.data.validation_share = 0.05
    config.data.test_share = 0.05

    config.model.n_vocab = 1024
    config.model.d_model = 128
    config.model.d_k = 64
    config.model.d_v = 128
    config.model.n_layer = 2
    config.model.n_code = 256
    config.model.block_len = 32
    config.model.mem_len = 32
    config.model.window_bias = 8.0
    config.model.temperature = "learned"
    config.model.key_shift = True
    config.model.c_gamma = 0.9
    config.model.c_revive = 0.1
    config.model.remat = "none"

    config.train.batch_size = 16
    config.train.update_len = 128  # four blocks: from the third on, gradients reach values in the cache
    config.train.num_steps = 1500
    config.train.context_schedule = "0:512,400:2048,800:0"
    config.train.log_every_steps = 50
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 1e-3

    config.checkpoint.every_steps = 500
    config.eval.every_steps = 1500
    config.eval.max_tokens = 500_000
    config.sample.length = 0
    return config
