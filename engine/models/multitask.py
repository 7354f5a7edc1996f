"""A model of one encoder and a head for each task."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..data.collate import PackedBatch
from ..data.task_schema import TaskSchema
from .adapters import AdaptersOfBatch, ProjectedAttention
from .config import EncoderConfig
from .context import Context
from .encoder import Stage
from .heads import (
    HALF,
    IN_BATCH,
    PLAIN,
    SHARED_INPUT,
    ClassLossSettings,
    Head,
    HeadSettings,
    Scores,
    SimilaritySettings,
    YesNoHead,
    build_head,
    head_class,
)
from .layers import Linear
from .lora import (
    LoraSettings,
    StoredUpdate,
    add_low_rank_updates,
    layers_of_updates,
    merge_updates,
    stored_updates,
    weights_of_updates,
)
from .named_modules import NamedModules
from .parameters import ParameterSpec, describe_stage
from .pooling import SharedLayers, TaskStates, pool
from .registry import spec_of
from .step_scores import StepScores


class MultitaskModel(nn.Module):
    """An encoder shared by several tasks.

    Args:
        config: of the encoder; its class decides the encoder's (engine/models/registry.py).
        tasks: the schema of each task, in order.
        features: by task, see :mod:`engine.models.heads`.
        pooling: ``"cls"`` or ``"mean"``.
        dropout_p: dropout before the heads.
        losses: by task, one of LOSSES (engine/models/heads); the default for those left out.
        class_losses: by task, what its loss does against classes of unequal size; nothing for those
            left out.
        similarities: by task, settings of a loss that compares them; the default for those left
            out.
        thresholds: by task, one of THRESHOLDS; HALF for those left out.
        adapter_width: of each task's projected attention (engine/models/adapters.py); 0 for none.
        objectives: the settings of their heads, by name; objectives have no adapters.
        lora: the low-rank updates of the encoder, which is frozen but for them
            (engine/models/lora.py); None for none.

    Attributes:
        lora: the low-rank updates that are not merged; None without any.
        merged_updates: those that are (:meth:`merge_lora`), as they were then.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tasks: Sequence[TaskSchema],
        features: Mapping[str, str],
        *,
        pooling: str,
        dropout_p: float,
        losses: Mapping[str, str] | None = None,
        class_losses: Mapping[str, ClassLossSettings] | None = None,
        similarities: Mapping[str, SimilaritySettings] | None = None,
        thresholds: Mapping[str, str] | None = None,
        adapter_width: int = 0,
        objectives: Mapping[str, HeadSettings] | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        # Weights are drawn from one generator, so the order of these lines must not change.
        of_objectives = {name: build_head(each) for name, each in (objectives or {}).items()}
        self.encoder = spec_of(config).encoder(config)
        self.pooling = pooling
        width, losses = config.hidden_size, losses or {}
        of_tasks = {
            task.task: HeadSettings(
                kind=task.kind,
                name=task.task,
                config=config,
                task=task,
                features=features[task.task],
                loss=losses.get(task.task, "default"),
                class_loss=(class_losses or {}).get(task.task, PLAIN),
                similarity=(similarities or {}).get(task.task, IN_BATCH),
                threshold=(thresholds or {}).get(task.task, HALF),
                dropout_p=dropout_p,
                dropout_id=self.encoder.num_dropouts + position,
            )
            for position, task in enumerate(tasks)
        }
        all_heads = (*of_tasks.values(), *(objectives or {}).values())
        shares = any("pair" in head_class(each.kind).layers_used(each) for each in all_heads)
        self.pair = Linear(SHARED_INPUT * width, width) if shares else None
        self.heads = NamedModules()
        self.heads.update({name: build_head(each) for name, each in of_tasks.items()})
        self.adapters = NamedModules()
        if adapter_width:
            first_dropout_id = self.encoder.num_dropouts + len(tasks)
            for position, name in enumerate(self.heads):
                self.adapters[name] = ProjectedAttention(
                    config,
                    adapter_width,
                    first_dropout_id=first_dropout_id + position * config.num_hidden_layers,
                )
        self.heads.update(of_objectives)
        self.lora = lora
        self.merged_updates: tuple[StoredUpdate, ...] = ()
        if lora is not None:
            used_by_adapters = len(self.adapters) * config.num_hidden_layers
            first_dropout_id = self.encoder.num_dropouts + len(tasks) + used_by_adapters
            add_low_rank_updates(self.encoder, lora, first_dropout_id)

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a pretrained encoder; low-rank updates stay as they are."""
        self.encoder.load_state_dict({**state, **weights_of_updates(self.encoder)})

    def merge_lora(self) -> None:
        """Add the low-rank updates, if any, to the weights that they are of, and remove them.

        They stay in :attr:`merged_updates`.
        """
        self.merged_updates += tuple(stored_updates(self.encoder, self.encoder.config))
        merge_updates(self.encoder)
        self.lora = None

    def head(self, name: str) -> Head:
        """Return the head of a task or objective."""
        return cast(Head, self.heads[name])

    def take_over(
        self, other: "MultitaskModel", heads: Collection[str], adapters: Collection[str]
    ) -> None:
        """Copy the encoder's weights from another model, and some of the others.

        Args:
            other: with an encoder of the same shape; low-rank updates are merged.
            heads: names of those that are taken; both models have them in the same shape.  The
                layer that heads share goes with one that uses it.
            adapters: the tasks whose adapters are taken, likewise.
        """
        self.load_encoder(other.encoder.state_dict())
        for name in heads:
            self.head(name).load_state_dict(other.head(name).state_dict())
        if any("pair" in self.head(name).uses for name in heads):
            assert self.pair is not None, "a head uses it"
            assert other.pair is not None, "so does that of the other model"
            self.pair.load_state_dict(other.pair.state_dict())
        for task in adapters:
            self.adapters[task].load_state_dict(other.adapters[task].state_dict())

    @property
    def thresholds(self) -> dict[str, tuple[float, ...]]:
        """The thresholds of the tasks whose are chosen on the dev data; logits, by task."""
        return {
            name: tuple(head.thresholds.tolist())
            for name, head in self.heads.items()
            if isinstance(head, YesNoHead) and head.threshold != HALF
        }

    def set_thresholds(self, found: Mapping[str, Sequence[float]]) -> None:
        """Set the thresholds that :attr:`thresholds` returned.

        Raises:
            ValueError: they are of another model; the message says whose.
        """
        for name, logits in found.items():
            if name not in self.thresholds:
                raise ValueError(f"thresholds of {name}, which has none")
            try:
                cast(YesNoHead, self.heads[name]).set_thresholds(logits)
            except ValueError as error:
                raise ValueError(f"of {name}: {error}") from None

    def _adapter(self, task: str) -> ProjectedAttention | None:
        return cast(ProjectedAttention, self.adapters[task]) if task in self.adapters else None

    @property
    def shared_layers(self) -> SharedLayers:
        """Shared layers that heads may use."""
        return SharedLayers(self.encoder.word_table, self.pair)

    def encoder_stages(self) -> list[Stage]:
        """Return the encoder's stages, in the order of the forward pass."""
        stages = []
        for stage in self.encoder.stages():
            name = f"encoder.{stage.name}"
            stages.append(stage._replace(name=name, bucket=name))
        return stages

    def stages(self) -> list[Stage]:
        """Return all stages: the encoder's, the layer that tasks share, heads, adapters.

        All heads share one bucket.  Adapters work in every layer, so their gradients are complete
        with those of the encoder's first stage, in whose bucket they are.
        """
        stages = self.encoder_stages()
        first = stages[0].bucket
        if self.pair is not None:
            stages.append(Stage("pair", self.pair, bucket="pair"))
        for task, head in self.heads.items():
            stages.append(Stage(f"heads.{task}", head, task, bucket="heads"))
        for task, adapter in self.adapters.items():
            stages.append(Stage(f"adapters.{task}", adapter, task, bucket=first))
        return stages

    def parameter_specs(
        self, tasks: Sequence[str], *, freeze_encoder: bool = False
    ) -> list[ParameterSpec]:
        """Describe every parameter, in the order of :meth:`named_parameters`.

        Args:
            tasks: the trained tasks.
            freeze_encoder: train all but the encoder, whose low-rank updates stay as they are, too.

        Raises:
            TypeError: a parameter of the encoder is in no stage, or in a layer that does not write
                task gradients, or ``lookups`` of the encoder leaves out a table.
        """
        self.encoder.check_lookups()
        all_tasks = () if freeze_encoder else tuple(tasks)
        of_encoder = None if self.lora is None else layers_of_updates(self.encoder)
        users = self._users_of_shared_layers(tasks)
        specs: list[ParameterSpec] = []
        for stage in self.stages():
            using: tuple[str, ...]
            trained = None
            if stage.task is not None:
                using = (stage.task,) if stage.task in tasks else ()
            elif stage.module is self.pair:
                using = users.get(self.pair, ())
            else:
                using, trained = all_tasks, of_encoder
            specs += describe_stage(stage, using, users, trained)
        for name in {name for name, _ in self.named_parameters()} - {spec.name for spec in specs}:
            raise TypeError(f"{name}: in no stage; name it in the stages() of its encoder")
        return specs

    def _users_of_shared_layers(self, tasks: Sequence[str]) -> dict[nn.Module, tuple[str, ...]]:
        """Return the tasks of the heads that use each shared layer."""
        users: dict[nn.Module, tuple[str, ...]] = {}
        for task in tasks:
            for name in cast(Head, self.heads[task]).uses:
                layer = getattr(self.shared_layers, name)
                users[layer] = (*users.get(layer, ()), task)
        return users

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all weights; buffers, such as sines of positions, keep their dtype, as in training.

        Args:
            dtype: of the weights from here on.
        """
        buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.to(dtype)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)

    def with_lookup_plan(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch, on the CPU, with the plan of its lookups if its step can use one."""
        if batch.states is not None:
            return batch
        context = Context.of(batch)
        plan = self.encoder.plan_lookups(batch.input_ids, context, batch.token_offsets)
        return replace(batch, lookup_plan=plan)

    def zero_sparse_rows(self, batch: PackedBatch) -> None:
        """Zero the task gradients of tables that the backward pass of a batch wrote."""
        plan = self.encoder.lookup_plan(batch.lookup_plan)
        context = Context.of(batch, lookup_plan=plan)
        self.encoder.zero_sparse_rows(batch.input_ids, context, batch.token_offsets)

    def forward(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        *,
        seed: Tensor | None = None,
        task_rows: bool = False,
        accumulate: bool = False,
    ) -> list[Scores]:
        """Score a packed batch.

        Args:
            batch: of K tasks.
            tasks: their names, in the order of the batch.
            seed: 0-dim int64, the dropout seed of this step; needed in training mode.
            task_rows: let the backward pass write task gradients into the attached rows.
            accumulate: let it add to the rows (later micro-batches).

        Returns:
            For each task the scores of its head, fp32.
        """
        hidden = self._encode(batch, tasks, seed, task_rows, accumulate)
        pooled = pool(hidden, batch.cu_seqlens, self.pooling)
        shared = self.shared_layers
        scores: list[Scores] = []
        for row, (task, tokens, sequences, cu_seqlens) in enumerate(
            zip(
                tasks,
                pairwise(batch.token_offsets),
                batch.own_sequences(),
                batch.task_cu_seqlens(),
                strict=True,
            )
        ):
            states = TaskStates(
                hidden[slice(*tokens)],
                pooled[sequences],
                cu_seqlens,
                batch.max_own_seqlen,
                batch.labels[row],
                seed,
                shared,
                row if task_rows else None,
                len(tasks),
            )
            has_examples = tokens[0] < tokens[1]  # other ranks may have all of them
            scores.append(self.heads[task](states) if has_examples else hidden.new_zeros(0).float())
        return scores

    def _encode(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        seed: Tensor | None,
        task_rows: bool,
        accumulate: bool,
    ) -> Tensor:
        """Return the hidden states ``[T, H]`` of a batch, or its precomputed ones."""
        if batch.states is not None:
            return batch.states.to(self.encoder.word_table.weight.dtype)
        of_tasks = [self._adapter(task) for task in tasks]
        has_adapters = any(adapter is not None for adapter in of_tasks)
        context = Context.of(
            batch,
            segments=kernels.TaskSegments(batch.token_offsets, accumulate) if task_rows else None,
            seed=seed,
            adapters=AdaptersOfBatch.of(of_tasks, batch, seed) if has_adapters else None,
            lookup_plan=self.encoder.lookup_plan(batch.lookup_plan) if task_rows else None,
        )
        hidden: Tensor = self.encoder(batch.input_ids, context)
        return hidden

    def losses(
        self,
        scores: Sequence[Scores],
        batch: PackedBatch,
        tasks: Sequence[str],
        of_step: Mapping[str, StepScores] = MappingProxyType({}),
    ) -> list[Tensor]:
        """Return each task's mean loss, 0-dim, from the scores of :meth:`forward`.

        A task without an example has loss 0.  For those in ``of_step`` it is the share of these
        examples in the mean loss of the step.

        Args:
            scores: of the tasks.
            batch: that they are of.
            tasks: their names.
            of_step: the scores of the whole step, for heads that compare its examples, where the
                batch is a part of it.

        Raises:
            ValueError: the batch has no labels of a task.
        """
        losses: list[Tensor] = []
        for task, own, labels in zip(tasks, scores, batch.labels, strict=True):
            head = self.head(task)
            if isinstance(own, Tensor) and not own.numel():
                losses.append(own.sum())
            elif isinstance(own, Tensor) and task in of_step:
                losses.append(head.step_loss(own, labels, of_step[task]))
            else:
                losses.append(head.loss(own, labels))
        return losses
