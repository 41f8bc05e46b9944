"""A model without its run: a folder that other programs can read and that can be imported into a new run.

    DIR/model.safetensors            the parameters, with a tensor per parameter and layer; docs/export.md has all names
    DIR/config.json                  the run's settings, without paths
    DIR/vocab.model or vocab.json    the vocabulary's file, if it has one
    DIR/generate.py                  a program that samples from the model

The safetensors file has one entry of metadata, `tvq_pod`, which is JSON: what generate.py needs to know about the
vocabulary, and the step and corpus that the parameters come from.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jax.typing import DTypeLike

from tvq_pod.config.run_config import to_json
from tvq_pod.config.settings import GENERATED, Settings
from tvq_pod.data.vocab import N_SPECIAL, ByteVocab, Vocab, keep_vocab, kept_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import new_folder
from tvq_pod.host.paths import is_bucket
from tvq_pod.nn.codebook import is_codebook

WEIGHTS = "model.safetensors"
DTYPES = dict(F32=np.float32, BF16=jnp.bfloat16)  # by safetensors' names
METADATA = "tvq_pod"  # one entry: safetensors writes several in an arbitrary order
NAMED_CORPORA = ("stdlib", "novels", "ansible", *GENERATED)  # corpora that are the same on every machine
PROGRAM = pathlib.Path(__file__).with_name("generate.py")


class Origin(NamedTuple):
    """The origin of parameters: a step of a run, and the fingerprint of the corpus that it was trained on."""

    step: int = 0
    fingerprint: str = ""


class Exported(NamedTuple):
    """The content of a folder: its tensors by name, its vocabulary, and the origin of the parameters."""

    tensors: dict[str, np.ndarray]
    vocab: Vocab
    origin: Origin


def tensor_names(params: dict) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Returns, for each tensor of a folder, in order, its path in the parameters' tree, and its layer's index; None for
    a parameter outside of the layers.

    params: those of `Transformer`, arrays or ShapeDtypeStructs. A name is the path with dots, and the layer's index
    after `layers`: layers.0.unit0.w_q.kernel.
    """
    names = {}
    for path, leaf in _flat(params).items():
        if path[0] != "layers":
            names[".".join(path)] = path, None
        else:
            names |= {".".join(("layers", str(n), *path[1:])): (path, n) for n in range(leaf.shape[0])}
    return dict(sorted(names.items()))


def tensors_of(params: dict, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """The parameters of `Transformer`, by the names of `tensor_names`, in `dtype`; codebooks and their counts stay
    float32, as everywhere in the model."""
    leaves = {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
    kinds = {path: np.float32 if _is_codebook(path) else dtype for path in leaves}
    return {
        name: np.asarray(leaves[path] if layer is None else leaves[path][layer], kinds[path], order="C")
        for name, (path, layer) in tensor_names(params).items()
    }


def params_of(tensors: dict[str, np.ndarray], abstract: dict, folder: epath.Path) -> dict:
    """The parameters, NumPy arrays like `abstract`, made from tensors that were read from `folder`.

    Raises UserError if a tensor is missing, has another shape, is not finite, or is not a parameter of the model.
    """
    expected, flat = tensor_names(abstract), _flat(abstract)
    here = f"--from={folder}"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{here}: {WEIGHTS} lacks {_listed(missing)}; give the file that belongs to this config.json")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(
            f"{here}: {WEIGHTS} has {_listed(unknown)}, which the model of config.json does not have; "
            "give the file that belongs to this config.json"
        )
    by_path = {path: [] for path in flat}
    for name, (path, layer) in expected.items():
        tensor, shape = tensors[name], flat[path].shape[layer is not None :]
        if tensor.shape != shape:
            raise UserError(
                f"{here}: the tensor {name} has the shape {tensor.shape}, but {shape} by config.json; "
                "give the file that belongs to this config.json"
            )
        if not np.all(np.isfinite(np.asarray(tensor, np.float32))):
            raise UserError(f"{here}: the tensor {name} has numbers that are not finite; export the model again")
        by_path[path].append(((layer or 0), tensor))
    params = {}
    for path, leaf in flat.items():
        parts = [tensor for _, tensor in sorted(by_path[path], key=lambda part: part[0])]
        params[path] = np.asarray(np.stack(parts) if path[0] == "layers" else parts[0], leaf.dtype)
    return traverse_util.unflatten_dict(params)


def write_exported(
    folder: epath.Path, params: dict, settings: Settings, vocab: Vocab, origin: Origin, dtype: DTypeLike
) -> None:
    """Writes all files of a folder, which appears atomically; in a bucket, the weights are written last, so they mark
    it as complete.

    params: those of `Transformer(settings.model)`, on the host. Raises UserError if they can't be written; then nothing
    is left behind.
    """
    about = dict(
        origin._asdict(),
        vocab=vocab.name,
        n_vocab=vocab.n_vocab,
        offset=vocab.offset,
        unknown=[*range(N_SPECIAL - vocab.offset), *([] if vocab.own_unknown is None else [vocab.own_unknown])],
    )
    content = tensors_of(params, dtype), {METADATA: json.dumps(about)}
    with new_folder("--to", folder) as draft:
        keep_vocab(vocab, draft)
        (draft / "config.json").write_text(to_json(_without_paths(settings, vocab)))
        (draft / PROGRAM.name).write_bytes(PROGRAM.read_bytes())
        if is_bucket(draft):
            (draft / WEIGHTS).write_bytes(safetensors.numpy.save(*content))
            return
        try:
            safetensors.numpy.save_file(content[0], draft / WEIGHTS, content[1])
        except safetensors.SafetensorError as error:  # safetensors turns an OSError into this
            raise OSError(str(error)) from None
        shutil.copymode(draft / "config.json", draft / WEIGHTS)  # safetensors makes it readable by nobody else


def read_exported(folder: epath.Path) -> Exported:
    """Reads a folder. Raises UserError if it is not an exported model, or is damaged. `params_of` checks the
    tensors."""
    here = f"--from={folder}"
    try:
        data = (folder / WEIGHTS).read_bytes()
        entries = safetensors.deserialize(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        about = json.loads(metadata.get(METADATA, "{}"))
        origin = Origin(about.get("step", 0), about.get("fingerprint", ""))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{here}: has no {WEIGHTS}; give a folder that --mode=export made") from None
    except OSError as error:
        raise UserError(f"{here}: {WEIGHTS} can't be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{here}: {WEIGHTS} is damaged ({str(error)[:200]}); export the model again") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{here}: the tensor {name} has the type {entry['dtype']}; must be {' or '.join(DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    vocab = kept_vocab(folder)
    if (expected := about.get("vocab", vocab.name)) != vocab.name:
        found = f"{vocab.file_name} is {vocab.name}" if vocab.file_name else "there is no vocab.model or vocab.json"
        raise UserError(f"{here}: {found}, but the model's vocabulary is {expected}; give the model's own file")
    return Exported(tensors, vocab, origin)


def _without_paths(settings: Settings, vocab: Vocab) -> Settings:
    """Settings without paths, so that they mean the same on another machine and in a run that begins with this
    model."""
    data, none = settings.data, Settings()
    return dataclasses.replace(
        settings,
        compile_cache=none.compile_cache,
        init_from=none.init_from,
        init_optimizer=none.init_optimizer,
        init_layers=none.init_layers,
        data=dataclasses.replace(
            data,
            source=data.source if data.source in NAMED_CORPORA else "",
            store="",
            mixture="",
            mixture_schedule="",
            vocab=vocab.file_name or ByteVocab.name,
        ),
    )


def _flat(tree: dict) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree, by their paths."""
    return traverse_util.flatten_dict(tree)


def _is_codebook(path: tuple[str, ...]) -> bool:
    return is_codebook(tuple(map(jax.tree_util.DictKey, path)))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
