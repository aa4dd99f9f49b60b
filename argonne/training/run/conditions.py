"""What each flag means to a run: part of what the run is, a condition that may change and is then told, or neither.

The identity (``setup.prepare``) is what ``pretrain.py`` must find as it was. The conditions are what a run was computed
and measured under: they follow from flags and from the machine, may change at any restart, and are announced and kept
(``changes`` in ``run.json`` and ``trainer.json``) when they do. All else leaves the run what it is: the layout, which
every line of ``metrics.jsonl`` has, where and when to save, and what trades time for memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch

from argonne.data import Shard, fingerprint
from argonne.kernels.dispatch import uses_triton
from argonne.parallel import Precision
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.identity import DATA, PRECISION_FLAGS, RunIdentity, differences, dtype_name

Meaning = Literal["identity", "condition", "free"]


def _all(meaning: Meaning, names: str) -> dict[str, Meaning]:
    return dict.fromkeys(names.split(), meaning)


MEANINGS: Mapping[str, Meaning] = {
    # The shape of the model.
    **_all("identity", "preset model_config hidden_size num_hidden_layers num_attention_heads num_key_value_heads"),
    **_all("identity", "head_dim intermediate_size vocab_size rope_theta rms_norm_eps tie_word_embeddings"),
    **_all("identity", "initializer_range family attention_bias max_position_embeddings dropout init_from"),
    **_all("identity", "resume_state"),
    # The samples and their order.
    **_all("identity", "data_glob tokenizer_path block_size add_document_boundary_tokens document_mask data_lanes"),
    **_all("identity", "streaming seed text_column filters filter_long_characters filter_max_digits"),
    **_all("identity", "filter_min_readable filter_min_tokens"),
    # Of instruction tuning: the template is the tokenizer's, the passes are steps.
    **_all("identity", "chat_template too_long epochs"),
    # The schedule; of the two that make the global batch with the layout, the product.
    **_all("identity", "total_steps learning_rate min_learning_rate warmup_steps weight_decay gradient_clip"),
    **_all("identity", "initial_batch_size gradient_accumulation_steps"),
    **_all("identity", "schedule decay_steps decay_shape"),
    **_all("identity", "adam_beta1 adam_beta2 adam_epsilon label_smoothing z_loss"),
    **_all("identity", "optimizer muon_momentum muon_precision"),
    # In fp16, where the loss scale began. Of the precision, the dtype of the state; the compute dtype is a condition.
    **_all("identity", "initial_loss_scale precision"),
    # Which bits; and of a reproducible run, the micro-batch, which is a leaf of its sums.
    **_all("identity", "reproducible reproducible_blocks"),
    # What is learnt from a teacher.
    **_all("identity", "teacher_path alpha temperature"),
    # What computes, what is done about damage, and what the held-out loss is measured on.
    **_all("condition", "kernels device on_bad_shard validation_glob validation_sequences"),
    **_all("condition", "eval eval_sequences"),
    **_all("condition", "compile disable_compile"),
    # What resume.py changes on purpose: the global batch and the optimizer's state.
    **_all("condition", "batch_size reset_optimizer rewarmup_steps"),
    # The layout.
    **_all("free", "tensor_parallel pipeline_parallel context_parallel sequence_parallel uneven_shards nproc"),
    **_all("free", "local_rank pipeline_schedule pipeline_interleave data_parallel fsdp fsdp_shard zero1"),
    # When and where to stop, save and show; how often to start again.
    **_all("free", "output_dir save_interval sample_tokens keep_checkpoints log_interval stop_at_step wall_time"),
    **_all("free", "eval_interval config print_config"),
    **_all("free", "max_restarts checkpoint_path force_from_scratch trace"),
    # The same samples and the same bits, sooner or in less memory; and permissions, whose effects are told.
    **_all("free", "num_proc cache_dir prefetch_batches min_batch_size disable_gradient_checkpointing"),
    **_all("free", "trust_remote_code accept_data_change"),
    **_all("free", "recompute"),
    # Where a teacher's weights are, and a permission.
    **_all("free", "teacher_device_map teacher_tensor_parallel allow_vocabulary_mismatch"),
    # What the search for the micro-batch goes by; what it finds is in initial_batch_size.
    **_all("free", "memory_limit"),
}
"""What another value of each flag means where a run is continued."""


def conditions_of(
    config: RunConfig,
    precision: Precision,
    device: torch.device,
    validation: Collection[Shard],
    compiled: bool = False,
    named: Mapping[str, Collection[Shard]] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a run is computed and measured under: JSON values. ``compiled`` are its blocks, if they can be.

    ``validation`` and ``named`` are the held-out shards.
    """
    sample = torch.empty(0, dtype=precision.compute, device=device)
    held_out = {"shards": fingerprint(tuple(validation)), "sequences": config.data.validation_sequences}
    return {
        "precision": {"compute": dtype_name(precision.compute)},
        "kernels": "triton" if uses_triton(config.training.kernels, x=sample) else "torch",
        "device": device.type,
        "compile": compiled,
        "held_out": held_out if validation else None,
        "eval": {
            name: {"shards": fingerprint(tuple(own)), "sequences": config.data.eval_sequences}
            for name, own in named.items()
        },
        "on_bad_shard": config.data.on_bad_shard,
        "torch": torch.__version__,
    }


def changed_since(
    saved: Mapping[str, Any], identity: RunIdentity, conditions: Mapping[str, Any], config: RunConfig
) -> list[str]:
    """What is not as in ``saved``, a checkpoint's ``trainer.json``, a line each.

    Raises:
        ArgonneError: the saved weights and moments would be converted, and no ``--precision`` asks for it.
    """
    before = RunIdentity.of_saved(saved)
    changed = before.differences(identity)
    if "precision" not in config.given and (lines := [line for line in changed if line.startswith("precision.")]):
        kept, asked = (PRECISION_FLAGS[each.state_dtype] for each in (before, identity))
        raise ArgonneError(
            f"the checkpoint's weights and moments would be converted ({lines[0]}); legal: --precision {kept} to go "
            f"on as it is, or --precision {asked} to convert them on purpose"
        )
    then = saved.get("conditions", {})
    return changed + differences(then, {name: value for name, value in conditions.items() if name in then})


def announced(changed: Collection[str]) -> list[str]:
    """The lines that tell of ``changed``, but for the data, of which the acceptance has told."""
    return [f"changed from here on: {line}" for line in changed if not line.startswith(DATA)]
