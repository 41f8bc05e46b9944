"""Samples from the model in this file's folder, with only NumPy and safetensors.

    python generate.py --prompt="It was" --length=400        or --tokens="76 119 35", for token ids in and out

The model is a Transformer-VQ (arXiv 2309.16354). It reads one token at a time, and its state never grows: it has the
last M + 1 tokens, and for each code the number of all older tokens and the mean of their values. So the millionth token
takes the time and memory of the first. It computes in float32.

Letters: D model width, M window, S codes, Q query heads, H key heads, G = Q / H, K key width, V value width.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import safetensors

END_OF_DOC, UNKNOWN, N_SPECIAL = 1, 2, 3  # token ids; those of text begin at N_SPECIAL
FOLDER = pathlib.Path(__file__).resolve().parent


def read_tensors(path: pathlib.Path) -> tuple[dict, dict]:
    """Returns the file's metadata about the model, and its tensors by name, in float32."""
    data, tensors = path.read_bytes(), {}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, tensor in safetensors.deserialize(data):
        array, is_half = tensor["data"], tensor["dtype"] == "BF16"  # NumPy has no bfloat16, the upper half of a float32
        array = np.frombuffer(array, "<u2").astype("<u4") << 16 if is_half else array
        tensors[name] = np.frombuffer(array, np.float32).reshape(tensor["shape"])
    return json.loads(header["__metadata__"]["tvq_pod"]), tensors


def rms_norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)


def silu(x):
    return 0.5 * x * (1 + np.tanh(0.5 * x))  # x times the logistic function, without its overflow


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x):
    weights = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def sinusoids(positions, width: int):
    """Sines and cosines of positions [n] with wavelengths from 2 pi to 2 pi * 1e5, [n, width]."""
    half = width // 2
    frequencies = np.float32(1e5) ** -(np.arange(half, dtype=np.float32) / max(half - 1, 1))
    angles = np.asarray(positions, np.float32)[:, None] * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), [(0, 0), (0, width % 2)])


class Model:
    """The model of a folder. `start` gives the state of an empty document; its first input is END_OF_DOC."""

    def __init__(self, folder: pathlib.Path):
        config = json.loads((folder / "config.json").read_text())
        self.config, self.is_of_images = config["model"], config["data"]["format"] == "imagenet64"
        self.about, self.tensors = read_tensors(folder / "model.safetensors")
        self.units = []  # the weights of all units, two per layer
        distances = sinusoids(np.arange(self.config["mem_len"] + 1), self.config["d_model"])
        for prefix in (f"layers.{n}.{unit}." for n in range(self.config["n_layer"]) for unit in ("unit0", "unit1")):
            w = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
            if "w_r.kernel" in w:  # [H, M + 1, K]: what a key's distance adds to the scores
                w["r"] = np.einsum("md,hkd->hmk", distances, w["w_r.kernel"]) * self.config["d_k"] ** -0.25
            self.units.append(w)

    def start(self) -> dict:
        """The state of a document before its first token. Each attention unit has z and v, the last tokens' codes and
        values, oldest first; the number and mean value of older tokens, by code; and `before`, the last query."""
        (n_head, n_code, d_k), d_v = self.tensors["layers.0.unit0.quantizer.codebook"].shape, self.config["d_v"]
        sizes = dict(v=[n_head, 0, d_v], count=[n_head, n_code], mean=[n_head, n_code, d_v], before=[n_head, d_k])
        zeros = {name: np.zeros(size, np.float32) for name, size in sizes.items()} | dict(z=np.zeros([n_head, 0], int))
        return dict(position=0, units=[{name: x.copy() for name, x in zeros.items()} for _ in self.units])

    def step(self, state: dict, token: int) -> np.ndarray:
        """Reads one token: updates the state, and returns the logits of the next token, float32 [n_vocab]."""
        config, tensors = self.config, self.tensors
        x = tensors["embedding"][token]  # [D]
        if config["pe_abs"]:
            x = x + tensors["pe_scale"] * sinusoids([state["position"]], config["d_model"])[0]
        state["position"] += 1
        for w, kept in zip(self.units, state["units"], strict=True):
            h = rms_norm(x) * w["norm.scale"]
            if "w_up.kernel" in w:  # an MLP
                x = x + gelu(w["w_up.kernel"][0] @ h) @ w["w_down.kernel"][0]
            else:
                x = x + self.attention(w, h, kept)
        if config["e_norm"]:
            x = rms_norm(x) * tensors["norm_out.scale"]
        return x @ (tensors["embedding"].T if config["e_tie"] else tensors["w_out"]) * config["e_scale"]

    def attention(self, w: dict, h, kept: dict):
        """The term that a unit with weights `w` adds to the residual stream, [D], from its normalized input h [D]."""
        config, codes = self.config, w["quantizer.codebook"]  # [H, S, K]
        q, k = w["w_q.kernel"] @ h, w["w_k.kernel"] @ h  # [Q or H, K]
        k = k + w.get("shift", 0.0) * kept["before"]
        kept["before"] = np.mean(q.reshape(len(codes), -1, q.shape[1]), axis=1)
        q, k = (rms_norm(x) * config["d_k"] ** -0.25 for x in (q, k))
        q = q * np.exp(w.get("log_sharpness", np.zeros(1)))[:, None]
        v = silu(w["w_v.kernel"] @ h) if "w_g.kernel" in w else w["w_v.kernel"] @ h  # [H, V]
        # the nearest code: |k - c|^2 / 2 without the term that all codes share
        z = np.argmin(np.sum(codes**2, axis=-1) / 2 - np.einsum("hk,hsk->hs", k, codes), axis=-1)
        if kept["z"].shape[1] > config["mem_len"]:  # the oldest token goes from the window to the cache
            place = np.arange(len(codes)), kept["z"][:, 0]
            kept["count"][place] += 1
            kept["mean"][place] += (kept["v"][:, 0] - kept["mean"][place]) / kept["count"][place][:, None]
            kept["z"], kept["v"] = kept["z"][:, 1:], kept["v"][:, 1:]
        kept["z"], kept["v"] = (np.concatenate([kept[n], x[:, None]], axis=1) for n, x in (("z", z), ("v", v)))

        q_content, q_position = ((q + w[name]).reshape(len(codes), -1, q.shape[1]) for name in "uv")  # [H, G, K]
        of_code = np.einsum("hgk,hsk->hgs", q_content, codes)
        of_distance = np.einsum("hgk,hmk->hgm", q_position, w["r"])[..., : kept["z"].shape[1]][..., ::-1]
        scores = np.take_along_axis(of_code, kept["z"][:, None], axis=-1) + of_distance + config["window_bias"]
        values = kept["v"]
        if config["agg_cache"]:
            with np.errstate(divide="ignore"):  # log(0) = -inf: no token has the code
                scores = np.concatenate([scores, of_code + np.log(kept["count"])[:, None]], axis=-1)
            values = np.concatenate([values, kept["mean"]], axis=1)
        out = (softmax(scores) @ values).reshape(len(q), -1)  # [Q, V]
        if "w_g.kernel" in w:
            out = out * silu(w["w_g.kernel"] @ h)
        return out.ravel() @ w["w_o.kernel"].reshape(out.size, -1)

    def generate(self, prompt: list[int], length: int, temperature: float, top_p: float, seed: int):
        """Yields at most `length` tokens of a document that begins with `prompt`, until it ends. They are drawn from
        the likeliest tokens that together have probability top_p; with temperature 0, each is the likeliest."""
        rng, state, logits = np.random.default_rng(seed), self.start(), np.zeros(0)
        may_come = np.array([END_OF_DOC] * (not self.is_of_images) + [*range(N_SPECIAL, self.about["n_vocab"])])
        for token in (END_OF_DOC, *prompt):
            logits = self.step(state, token)
        for _ in range(length):
            order = may_come[np.argsort(-logits[may_come], kind="stable")]  # likeliest first
            shares = softmax(logits[order].astype(float) / max(temperature, 1e-12))
            shares[np.cumsum(shares) - shares >= top_p] = 0.0
            token = int(rng.choice(order, p=shares / np.sum(shares)))
            if token == END_OF_DOC:
                return
            yield token
            logits = self.step(state, token)


def text_functions(about: dict):
    """Functions from text to token ids and back, from the package that the model's vocabulary needs."""
    kind, offset = about["vocab"].partition(":")[0], about["offset"]
    encode, decode = str.encode, lambda ids: bytes(ids).decode(errors="replace")  # bytes
    try:
        if kind == "sentencepiece":
            import sentencepiece

            pieces = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "vocab.model"))
            encode, decode = pieces.encode, pieces.decode
        elif kind == "tokenizers":
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "vocab.json"))
            tokenizer.no_truncation()
            tokenizer.encode_special_tokens = True
            encode, decode = (lambda text: tokenizer.encode(text, add_special_tokens=False).ids), tokenizer.decode
    except ImportError:
        sys.exit(f"error: text needs pip install {kind}; or give token ids, as in --tokens='5 6 7'")
    return (
        lambda text: [UNKNOWN if id_ in about["unknown"] else id_ + offset for id_ in encode(text)],
        lambda tokens: decode([token - offset for token in tokens]),
    )


def main():
    parser = argparse.ArgumentParser(description="Samples from the model in this folder.")
    parser.add_argument("--prompt", default="", help="text that the sample continues")
    parser.add_argument("--tokens", type=str.split, help="a prompt of token ids, with spaces; prints token ids, too")
    for name, default in dict(length=400, temperature=1.0, top_p=0.95, seed=0).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(%(default)s)")
    given, model = parser.parse_args(), Model(FOLDER)
    how, n_vocab = (given.temperature, given.top_p, given.seed), model.about["n_vocab"]
    if not (min(given.length, given.seed) >= 0 <= given.temperature < float("inf") and 0 < given.top_p <= 1):
        sys.exit("error: --length, --seed and --temperature must be at least 0, and --top_p above 0 and at most 1")
    if wrong := [token for token in given.tokens or () if not (token.isdecimal() and int(token) < n_vocab)]:
        sys.exit(f"error: --tokens: {wrong[0]} is not a token id; the model has 0 to {n_vocab - 1}")
    if given.tokens is not None:
        print(*model.generate([*map(int, given.tokens)], given.length, *how))
    elif model.is_of_images:  # a PPM file; an image is a complete document, so it has no prompt
        image = bytes(token - N_SPECIAL for token in model.generate([], 64 * 64 * 3, *how))
        sys.stdout.buffer.write(b"P6 64 64 255\n" + image)
    else:
        to_tokens, to_text = text_functions(model.about)
        prompt = given.prompt.encode(errors="surrogateescape").decode(errors="replace")  # now valid UTF-8
        text = prompt + to_text(list(model.generate(to_tokens(prompt), given.length, *how)))
        sys.stdout.buffer.write(f"{text}\n".encode(sys.stdout.encoding, errors="replace"))  # in any encoding


if __name__ == "__main__":
    main()
