"""Any EAGLE-3 or P-EAGLE draft directory, ours or another's, as one model that can be run and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.files import VOCAB_FILE, VOCAB_TENSOR
from eagle_offline.draft.origin import DraftOrigin, read_origin
from eagle_offline.draft.warm_start import DraftWeights
from eagle_offline.errors import DataError, MismatchError, one_line
from eagle_offline.serving.configs import ConfigFile, DraftLayout, aux_layer_ids_of, quiet_transformers, read_config
from eagle_offline.serving.layouts import (
    EMBEDDINGS_TENSOR,
    HEAD_NORM_SUFFIXES,
    HEAD_TENSOR,
    MEMBERS_TENSOR,
    OFFSETS_TENSOR,
    SPECULATORS_KINDS,
    draft_config,
    expected_shapes,
    ids_of,
    members_of,
    parameter_name,
)
from eagle_offline.serving.tensor_files import DTYPES, FLOAT_DTYPES, TensorFiles, open_tensors

# Tensors that some trainers save along and that say nothing about the draft.
_IDLE_TENSORS = ("verifier_lm_head.weight", "verifier_norm.weight")
_IDLE_SUFFIX = "rotary_emb.inv_freq"
_TENSORS_PER_LAYER = 9


@dataclass(frozen=True)
class ServedDraft:
    """A draft read from a directory.

    Attributes:
        model: in eval mode, on the CPU, in the dtype it is stored in (the widest, if there are several).
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        aux_layer_ids: 0-based outputs of target layers, low first; None when the directory does not say.
        layout: of the directory.
        has_embeddings: False when the target's must be put in before use; they are zero until then.
        origin: what it was trained for and from; None for a draft made elsewhere.
    """

    model: Eagle3DraftModel
    selected_token_ids: Tensor
    aux_layer_ids: list[int] | None
    layout: DraftLayout
    has_embeddings: bool
    origin: DraftOrigin | None

    def weights(self, name: str) -> DraftWeights:
        """Return what training needs to start from this draft, called ``name`` in messages."""
        tensors = {
            parameter: tensor.detach()
            for parameter, tensor in self.model.named_parameters()
            if self.has_embeddings or parameter != EMBEDDINGS_TENSOR
        }
        return DraftWeights(name, self.model.config, tensors, self.selected_token_ids, self.aux_layer_ids)


def detect_layout(directory: Path) -> DraftLayout:
    """Return whether a directory is a checkpoint of ours or in one of the layouts that engines serve.

    Raises:
        DataError: it is no draft.
    """
    return read_config(directory).layout


def read_draft(directory: Path) -> ServedDraft:
    """Read a draft of any layout.

    A draft vocabulary whose ids are not in order is put in order, and the head's rows with it.

    Raises:
        DataError: not a draft, files missing or torn, tensors missing, not finite, or of other shapes than the config
            says.
        MismatchError: config, tensors and ids disagree, or the draft needs something that is not implemented.
    """
    file = read_config(directory)
    origin = read_origin(directory)
    files = open_tensors(directory)
    config = _model_config(file, files)
    names = _names(file, files, config)
    _check_shapes(files, config, names)
    ids = _native_ids(file) if file.layout == "native" else _ids(file, files, config)
    tensors = {ours: _read_finite(files, theirs) for ours, theirs in names.items()}
    order = ids.argsort()
    if not torch.equal(order, torch.arange(len(ids))):
        ids, tensors[HEAD_TENSOR] = ids[order], tensors[HEAD_TENSOR][order]
    _check_ids(file, ids, config)
    aux_layer_ids = _aux_layer_ids(file, config, origin)
    return ServedDraft(
        model=_build(file, config, tensors),
        selected_token_ids=ids,
        aux_layer_ids=aux_layer_ids,
        layout=file.layout,
        has_embeddings=EMBEDDINGS_TENSOR in names,
        origin=origin,
    )


def model_config(file: ConfigFile, num_aux: int, mask_token_id: int | None) -> Eagle3DraftConfig:
    """Return our config of a draft in any layout.

    Args:
        file: its config.
        num_aux: ``A``.
        mask_token_id: of a P-EAGLE draft; None for one that drafts a chain.

    Raises:
        DataError: sizes that are missing or no numbers.
        MismatchError: values that transformers refuses.
    """
    sizes = {
        name: file.integer(name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    }
    sizes["num_key_value_heads"] = file.integer("num_key_value_heads", sizes["num_attention_heads"])
    sizes["head_dim"] = file.integer("head_dim", max(1, sizes["hidden_size"] // sizes["num_attention_heads"]))
    sizes["num_hidden_layers"] = file.integer("num_hidden_layers", 1)
    try:
        with quiet_transformers():
            return draft_config(
                file.fields,
                **sizes,
                vocab_size=file.vocab_size,
                draft_vocab_size=file.integer("draft_vocab_size", file.vocab_size, nested=False),
                target_hidden_size=file.target_hidden_size,
                num_aux_hidden_states=num_aux,
                fc_norm=file.flag("fc_norm"),
                norm_output=file.flag("norm_output"),
                layer_style=file.layer_style,
                parallel_drafting=mask_token_id is not None,
                mask_token_id=mask_token_id,
            )
    except (DataError, MismatchError):
        raise
    except Exception as error:  # transformers validates each field with an exception of its own
        raise MismatchError(f"{file.path}: transformers refuses this config: {one_line(error)}") from error


def _model_config(file: ConfigFile, files: TensorFiles) -> Eagle3DraftConfig:
    _refuse_what_cannot_run(file, files)
    file.refuse_unknown_rope_type()
    width = file.target_hidden_size
    fc = files.headers.get("fc.weight")
    if fc is None or len(fc.shape) != 2:
        raise DataError(f"{file.directory}: fc.weight is missing or not a matrix: not a draft")
    if fc.shape[1] % width or not fc.shape[1]:
        raise MismatchError(
            f"{file.directory}: fc.weight reads {fc.shape[1]} values, which is not a number of aux states of "
            f"{width} (target_hidden_size, or else hidden_size)"
        )
    num_aux = fc.shape[1] // width
    written = file.fields.get("num_aux_hidden_states")
    if written is not None and written != num_aux:
        raise MismatchError(f"{file.path}: num_aux_hidden_states {written!r}, but fc.weight reads {num_aux}")
    config = model_config(file, num_aux, file.mask_token_id() if file.is_parallel(files.headers) else None)
    if config.num_hidden_layers * _TENSORS_PER_LAYER > len(files.headers):
        raise DataError(f"{file.directory}: too few tensors for num_hidden_layers {config.num_hidden_layers}")
    if config.num_attention_heads % (config.num_key_value_heads or 1):
        raise MismatchError(
            f"{file.path}: {config.num_attention_heads} attention heads cannot share {config.num_key_value_heads}"
        )
    return config


def _refuse_what_cannot_run(file: ConfigFile, files: TensorFiles) -> None:
    """Raise `MismatchError` for a draft that our model would run otherwise than it was trained."""
    content, fields, kind = file.content, file.fields, file.content.get("speculators_model_type")
    scaled = content.get("logit_scale") not in (None, 1, 1.0) or content.get("final_logit_softcapping")
    model_type = fields.get("model_type", "llama" if file.layout == "flat" else None)
    known_kind, _ = SPECULATORS_KINDS[file.is_parallel(files.headers)]
    layer_types = fields.get("layer_types")
    refused = {
        f"speculators_model_type {kind!r} of {known_kind} parts": file.layout == "speculators" and kind != known_kind,
        f"model_type {model_type!r} with {file.layer_style} layers": file.layout != "native"
        and model_type != file.layer_style,
        "attention_bias": fields.get("attention_bias"),
        "mlp_bias": fields.get("mlp_bias"),
        "q/k norms in Llama layers": file.layer_style == "llama"
        and any(name.endswith(HEAD_NORM_SUFFIXES) for name in files.headers),
        "norm_before_residual": file.flag("norm_before_residual"),
        "norm_before_fc": file.flag("norm_before_fc"),
        "use_aux_hidden_state false": file.eagle_config.get("use_aux_hidden_state") is False,
        "tie_word_embeddings": content.get("tie_word_embeddings") or fields.get("tie_word_embeddings"),
        "sliding attention": fields.get("use_sliding_window")
        or (isinstance(layer_types, list) and "sliding_attention" in layer_types),
        "a scale or cap on the draft's logits": scaled,
        "quantized weights": file.fields.get("quantization_config")
        or content.get("quantization_config")
        or _unknown_dtype(files),
        f"hidden_act {fields.get('hidden_act')!r}": str(fields.get("hidden_act", "silu")) not in ACT2FN,
    }
    reasons = [reason for reason, refuse in refused.items() if refuse]
    if reasons:
        raise MismatchError(f"{file.directory}: this draft cannot be run here: {', '.join(reasons)}")


def _unknown_dtype(files: TensorFiles) -> bool:
    floats = (h for name, h in files.headers.items() if not name.endswith((OFFSETS_TENSOR, MEMBERS_TENSOR)))
    return any(DTYPES.get(header.dtype) not in FLOAT_DTYPES for header in floats)


def _names(file: ConfigFile, files: TensorFiles, config: Eagle3DraftConfig) -> dict[str, str]:
    """Return the stored name of every parameter by our name; embeddings may be absent outside our checkpoints."""
    stored = {parameter_name(name): name for name in files.headers}
    expected = expected_shapes(config)
    names = {name: stored[name] for name in expected if name in stored}
    missing = [name for name in expected if name not in stored]
    own_width = config.target_hidden_size == config.hidden_size
    if EMBEDDINGS_TENSOR in missing and file.layout != "native" and own_width:
        missing.remove(EMBEDDINGS_TENSOR)
    if missing:
        prefixed = " (names must not begin with `model.`)" if any(n.startswith("model.") for n in stored) else ""
        raise DataError(f"{file.directory}: missing tensors: {', '.join(missing[:4])}{prefixed}")
    twins = {f"layers.{index}.hidden_norm.weight" for index in range(1, config.num_hidden_layers)}
    known = {*expected, *twins, *_IDLE_TENSORS, OFFSETS_TENSOR, MEMBERS_TENSOR}
    extra = [stored[name] for name in sorted(stored) if name not in known and not name.endswith(_IDLE_SUFFIX)]
    if extra:
        raise MismatchError(f"{file.directory}: tensors of an unknown kind of draft: {', '.join(extra[:4])}")
    for twin in sorted(twins & stored.keys()):
        plain = twin.replace("hidden_norm", "input_layernorm")
        if not torch.equal(files.read(stored[twin]), files.read(stored[plain])):
            raise MismatchError(f"{file.directory}: {twin} and {plain} differ: engines would not agree on this draft")
    return names


def _check_shapes(files: TensorFiles, config: Eagle3DraftConfig, names: dict[str, str]) -> None:
    for name, shape in expected_shapes(config).items():
        if name not in names or files.headers[names[name]].shape == shape:
            continue
        found = files.headers[names[name]].shape
        text = f"{files.directory}: {names[name]}: expected shape {list(shape)} from the config, found {list(found)}"
        raise MismatchError(f"{text} (draft_vocab_size)") if name == HEAD_TENSOR else DataError(text)


def _read_finite(files: TensorFiles, name: str) -> Tensor:
    tensor = files.read(name)
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{files.headers[name].file}: {name} holds NaN or infinity: train or download this draft again")
    return tensor


def _native_ids(file: ConfigFile) -> Tensor:
    path = file.directory / VOCAB_FILE
    try:
        ids = load_file(path)[VOCAB_TENSOR]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: the draft vocabulary cannot be read: {one_line(error)}") from error
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise DataError(f"{path}: expected int64 [Vd], found {ids.dtype} {list(ids.shape)}")
    return ids


def _ids(file: ConfigFile, files: TensorFiles, config: Eagle3DraftConfig) -> Tensor:
    draft_size = config.draft_vocab_size or config.vocab_size
    header = files.headers.get(OFFSETS_TENSOR)
    if header is None:
        if draft_size == config.vocab_size:
            return torch.arange(draft_size)
        raise DataError(f"{file.directory}: {OFFSETS_TENSOR} is missing, with {draft_size} of {config.vocab_size} ids")
    if header.shape != (draft_size,) or DTYPES.get(header.dtype) not in (torch.int64, torch.int32):
        raise DataError(
            f"{file.directory}: {OFFSETS_TENSOR}: expected integers of shape [{draft_size}] (draft_vocab_size), found "
            f"{header.dtype} {list(header.shape)}"
        )
    ids = ids_of(files.read(OFFSETS_TENSOR))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise MismatchError(
            f"{file.directory}: {OFFSETS_TENSOR} leads to ids from {int(ids.min())} to {int(ids.max())}, outside a "
            f"vocabulary of {config.vocab_size}; it must hold offsets (target id minus draft id)"
        )
    if MEMBERS_TENSOR in files.headers:
        members = files.read(MEMBERS_TENSOR)
        if members.shape != (config.vocab_size,) or not torch.equal(members.bool(), members_of(ids, config.vocab_size)):
            raise MismatchError(f"{file.directory}: {MEMBERS_TENSOR} does not mark the ids that {OFFSETS_TENSOR} names")
    return ids


def _check_ids(file: ConfigFile, ids: Tensor, config: Eagle3DraftConfig) -> None:
    draft_size = config.draft_vocab_size or config.vocab_size
    if len(ids) != draft_size:
        raise MismatchError(f"{file.directory}: {len(ids)} ids in the draft vocabulary, draft_vocab_size {draft_size}")
    if bool((ids.diff() <= 0).any()):
        raise MismatchError(f"{file.directory}: an id is in the draft vocabulary twice")
    if int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
        raise MismatchError(f"{file.directory}: ids of the draft vocabulary outside one of {config.vocab_size}")


def _aux_layer_ids(file: ConfigFile, config: Eagle3DraftConfig, origin: DraftOrigin | None) -> list[int] | None:
    written = aux_layer_ids_of(file) if file.layout != "native" else None
    trained = origin.aux_layer_ids if origin is not None else None
    if written is not None and trained is not None and written != trained:
        raise MismatchError(f"{file.path}: reads target layers {written}, but origin.json says {trained}")
    ids = trained if written is None else written
    if ids is not None and len(ids) != config.num_aux_hidden_states:
        raise MismatchError(
            f"{file.path}: names {len(ids)} aux layers {ids}, but fc.weight reads {config.num_aux_hidden_states}"
        )
    return ids


def _build(file: ConfigFile, config: Eagle3DraftConfig, tensors: dict[str, Tensor]) -> Eagle3DraftModel:
    dtype = next(iter(tensors.values())).dtype
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    if EMBEDDINGS_TENSOR not in tensors:
        tensors[EMBEDDINGS_TENSOR] = torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype)
    try:
        with torch.device("meta"):
            model = Eagle3DraftModel(config)
        model.rotary(torch.zeros(1, 1, dtype=torch.int64), torch.float32)
    except Exception as error:  # a config of plausible sizes that still makes no model: heads, RoPE settings
        raise MismatchError(f"{file.path}: no draft can be made of this config: {one_line(error)}") from error
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()
