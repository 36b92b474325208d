"""A causal language model that generates, scores and is updated: any transformers model, one optimizer."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fuserl import attention, families, layers
from fuserl.engine import adapters, gathered, prompts, ranks, second_models, sharding, sources
from fuserl.engine.batch import Batch, Rollouts, taken
from fuserl.engine.distilling import HeadInput
from fuserl.engine.losses import Loss
from fuserl.engine.meter import Meter, phase, span
from fuserl.engine.optimizer import Optimizer, schedule
from fuserl.engine.padded import Padded, padded
from fuserl.engine.policy_settings import Sampling, Updating
from fuserl.engine.prompts import Prompt, Task
from fuserl.engine.tally import Tally
from fuserl.engine.work import Costs
from fuserl.kernels import dispatch
from fuserl.kernels.divergence_terms import KINDS
from fuserl.kernels.linear_policy_loss import IMPLS, linear_policy_loss
from fuserl.kernels.second_head import Reference
from fuserl.kernels.tree_layout import Packed


class Policy:
    """The model under training with its tokenizer, sampling settings, optimizer and random streams.

    Args:
        model: a transformers causal language model with float32 parameters, or peft's LoRA around one.
        tokenizer: its tokenizer; None where nothing is generated.
        sampling, updating: the settings of `generate` and `update`.
        seed: of every random stream.
        reference, teacher: what is read as ref_... and teacher_...: a model, or what a `Teacher` says it is.
        offload: keep those of them that have weights of their own on the host while they are not read.
        value: put a value head on the model, for losses of the outputs "value" and "score"; it starts at 0.
        compute: dtype of the products; below float32 they run under autocast.
        cut: over the ranks by FSDP2, where there are several, instead of held whole by each.

    The ranks of a run call the same methods with the same arguments: each completes some of the prompts and runs some
    of the micro-batches, and all of them return the same.
    """

    def __init__(
        self, model, tokenizer, sampling: Sampling, updating: Updating, *, seed=0, reference=None, teacher=None,
        value=False, compute=torch.float32, cut=False, offload=False,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.updating, self.seed = sampling, updating, seed
        self.calls = 0  # of generate: numbers the random streams
        self.source, self._synced = sources.Own(model, tokenizer), None  # None: never yet, else optimizer steps by then
        _attach(model)
        weight = adapters.head_weight(model)
        adapters.head_terms(model)  # one that cannot be honoured is refused now, not after a rollout
        self.device, self.compute = weight.device, compute
        self.meter, self.costs = Meter(), Costs(model, compute)
        dispatch.choose("linear_policy_loss", IMPLS, self.device)  # a backend that cannot run is refused now, not later
        # Without a bias, as transformers' classifiers have it.
        self.value = nn.Linear(weight.shape[1], 1, bias=False).to(self.device) if value else None
        if self.value is not None:
            nn.init.zeros_(self.value.weight)
        self._cut = cut and ranks.world() > 1
        self.seconds = second_models.of(model, ref=reference, teacher=teacher, offload=offload, cut=self._cut)
        for each in self.seconds.values():
            if each.own is not None:
                _attach(each.own)
        self._spread()
        # The parameters stay float32: a 16-bit one would round an update of 1e-5 away.
        self.optimizer = Optimizer(
            self.parameters().items(),
            lr=updating.lr,
            weight_decay=updating.weight_decay,
            max_grad_norm=updating.max_grad_norm,
            factor=schedule(updating.schedule, warmup=updating.warmup, total=updating.total),
        )

    def _spread(self) -> None:
        """Give every rank the first one's weights, or its piece of them."""
        own = dict.fromkeys(second.own for second in self.seconds.values())
        for each in filter(None, (adapters.base(self.model), self.value, *own)):
            sharding.align(each)
            if self._cut:
                sharding.cut(each, self.device)

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name: what a checkpoint holds."""
        head = {} if self.value is None else dict(self.value.named_parameters(prefix="value_head"))
        return {**adapters.trained(self.model), **head}

    def check_lengths(self, task: Task, completed: Sequence[str]) -> None:
        """Raise ValueError where a problem of the task, with its completion, is longer than the model can read.

        Or where nothing could end the completions that are `completed` with: no stop text and no end-of-text token.
        """
        if completed and not self.sampling.stop and self.tokenizer.eos_token_id is None:
            raise ValueError(
                "Policy: the tokenizer must have an end-of-text token for completions to learn from to end with; it "
                "has none. Name a text that ends them with --stop."
            )
        positions = getattr(adapters.base(self.model).config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and self.tokenizer is not None:
            prompts.check_lengths(task, self.tokenizer, positions, self.sampling.max_new_tokens, completed=completed)

    def encode(self, text: str) -> Tensor:
        """Token ids of a prompt, (T,) int64."""
        return torch.tensor(self.tokenizer(text).input_ids)

    def encode_completion(self, prompt: str, answer: str) -> Tensor:
        """Token ids of an answer as the policy would complete a prompt with it, ended by the first stop text or eos.

        A space goes between the two where neither has one there.
        """
        seam = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        text = f"{seam}{answer}{self.sampling.stop[0] if self.sampling.stop else ''}"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(ids if self.sampling.stop else [*ids, self.tokenizer.eos_token_id])

    @phase("generate")
    def generate(
        self,
        prompts: list[Prompt],
        *,
        group_size: int = 1,
        greedy: bool = False,
        stream: int | None = None,
        **turns,
    ) -> Rollouts:
        """Complete every prompt `group_size` times; each completion is a function of (seed, call, its number).

        Args:
            prompts: G of them.
            greedy: take the likeliest token each time.
            stream: a number instead of the call's own, which then is not counted: for draws beside the training's.
            turns: forced, reply and chunk, as in `generation.generate`.
        """
        settings = self.sampling
        if stream is None and not greedy:
            self.calls += 1
            stream = self.calls
        own = ranks.share(len(prompts))
        if turns.get("forced") is not None:
            turns["forced"] = turns["forced"][own.start * group_size : own.stop * group_size]
        with self._autocast(), sharding.uncut(adapters.base(self.model)):
            completed = own and self.source.generate(
                [prompts[number] for number in own],
                group_size=group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=0.0 if greedy else settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                stop=settings.stop,
                kv_gb=settings.kv_gb,
                **turns,
                seed=(self.seed << 32) + (stream or 0),
                streams=own,
            )
        if completed:
            read, drawn = self.costs.generation(completed)
            self.meter.add(read=read, drawn=drawn)
        return gathered.rollouts(completed or None, prompts)

    def sync(self) -> None:
        """Let completions come from the weights as they are; where the source has its own, only this does."""
        if self.source.apart and self._synced != self.optimizer.count:
            with self.meter.phase("generate"):
                self.source.sync()
            self._synced = self.optimizer.count

    @phase("score")
    @torch.no_grad()
    def score(self, batch: Batch, fields: Sequence[str], index: Tensor | None = None) -> Batch:
        """The batch with those of `fields` that it lacks, (N,) float32; with the rollouts `index` (b,) only theirs.

        old_logprobs and values are of the model as it is, ref_logprobs of the reference. `old_`, `ref_` or `teacher_`
        and an output of the head (old_mean_logprob, teacher_logprob) go into `extra`. What the others have is NaN.
        "features" go into `facts`, (B, D): the mean over a rollout's tokens of the reference's last hidden states.
        """
        index = torch.arange(len(batch.group)) if index is None else index
        missing = [field for field in fields if field not in batch.extra and getattr(batch, field, None) is None]
        for who, outputs in second_models.fields(field for field in missing if field != "features").items():
            with self._reading(who) as model:
                seen = batch.as_taught if who == "teacher" else batch
                scored = self._scored(seen, index, tuple(outputs.values()), model)
            named = {field: scored[output] for field, output in outputs.items()}
            own = {field: value for field, value in named.items() if hasattr(batch, field)}
            batch = batch.replace(**own, extra=batch.extra | {f: x for f, x in named.items() if f not in own})
        if "features" in missing and "features" not in batch.facts:
            with self._reading("ref") as model:
                batch = batch.replace(facts=batch.facts | {"features": self._features(batch, model)})
        return batch

    @phase("update")
    def update(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """Take the optimizer steps of one batch; return the averages of the loss's statistics.

        Rollouts whose tokens are all known to have a zero gradient cost no forward and no backward. With one epoch and
        one minibatch the old log-probs are the detached current ones, without a forward of their own.
        """
        settings, tally, reads = self.updating, Tally(), set(loss.reads)
        if settings.epochs * settings.minibatches > 1 and "logprob" in loss.outputs:
            reads.add("old_logprobs")
        for second in self.seconds.values():
            second.begin()
        batch = self.score(batch, reads, _taught(batch, loss))
        self.model.train()
        for _ in range(settings.epochs):
            for part in batch.minibatches(settings.minibatches, whole_groups=loss.scope == "group"):
                self._step(part, loss, tally)
        for second in self.seconds.values():
            second.end()
        means = tally.means()
        if batch.ref_logprobs is None:
            means.pop("kl", None)
        return means

    @torch.no_grad()
    def measure(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """The averages of a loss's statistics over a batch, without an update."""
        tally, batch = Tally(), self.score(batch, loss.reads)
        self.model.eval()
        everyone = torch.arange(len(batch.group))
        for micro, counts in self._own(batch, everyone, whole_groups=loss.scope == "group"):
            statistics = self._forward(batch.rollouts_at(micro), loss, self.model)[2]
            if counts:
                tally.observe(statistics)
        return tally.means()

    def _step(self, batch: Batch, loss: Loss, tally: Tally) -> None:
        index = _taught(batch, loss)
        tally.agreed(live=torch.tensor(len(index) / max(len(batch.group), 1)))
        tally.steps += 1
        if not len(index):
            return
        for micro, counts in self._own(batch, index, whole_groups=loss.scope == "group"):
            part = batch.rollouts_at(micro)
            value, out, statistics = self._forward(part, loss, self.model)
            (value if counts else 0.0 * value).backward()
            if not counts:
                continue
            tally.add(loss=value.detach())
            if "logprob" in loss.outputs:
                tally.observe({**statistics, "entropy": out.entropy})
                tally.compare(out.logprob if part.old_logprobs is None else part.old_logprobs, part)
            else:
                tally.observe(statistics)
        with span("optimizer"):
            sharding.sum_gradients(self.optimizer.parameters.values())
            tally.agreed(**self.optimizer.step())

    def _own(self, batch: Batch, index: Tensor, *, whole_groups: bool = False) -> Iterator[tuple[Tensor, bool]]:
        """This rank's micro-batches of the rollouts `index`, and whether each counts.

        One that does not count only keeps step with the other ranks, for which a cut model waits in every layer.
        """
        world = ranks.world()
        parts = batch.balanced(index, self.updating.micro_tokens, of=world, whole_groups=whole_groups)
        for first in range(0, len(parts), world):
            at = first + ranks.rank()
            if at < len(parts):
                yield parts[at], True
            elif self._cut:
                yield min(parts, key=len), False

    def _scored(self, batch: Batch, index: Tensor, outputs: tuple[str, ...], model) -> dict[str, Tensor]:
        """Outputs at every token of the rollouts `index`, NaN at the others, (N,) float32 on the host."""
        model.eval()
        scored = {name: torch.zeros(len(batch.tokens)) for name in outputs}
        zeros = Loss(lambda out, part: (torch.zeros(len(part.tokens), device=self.device), {}), outputs=outputs)
        for micro, counts in self._own(batch, index):
            rows, out = batch.rows_of(micro), self._forward(batch.rollouts_at(micro), zeros, model)[1]
            for name in outputs if counts else ():
                scored[name][rows] = getattr(out, name).float().cpu()
        found = torch.zeros(len(batch.tokens), dtype=torch.bool)
        found[batch.rows_of(index)] = True
        return {name: torch.where(found, ranks.summed(values), torch.nan) for name, values in scored.items()}

    def _forward(self, batch: Batch, loss: Loss, model) -> tuple[Tensor, SimpleNamespace, dict[str, Tensor]]:
        """The loss of a batch, the outputs it saw (detached), and its statistics."""
        return sharding.inside(adapters.base(model), lambda: self._through(batch, loss, model))

    def _through(self, batch: Batch, loss: Loss, model) -> tuple[Tensor, SimpleNamespace, dict[str, Tensor]]:
        packed = self._packed(batch, model, whole="score" in loss.outputs)
        live, part, of_head = loss.live(batch), batch.to(self.device), bool({*loss.outputs} - {"value", "score"})
        if torch.is_grad_enabled():
            rows = 0 if not of_head else len(batch.tokens) if live is None else int(live.sum())
            self.meter.add(update=self.costs.update(packed.position_ids.flatten(), rows))
        states, packed = self._states(packed, model)
        places = {"value": packed.predictor, "score": packed.reader}
        heads = {name: self._valued(taken(states, places[name])) for name in places if name in loss.outputs}
        if not of_head:
            losses, statistics = loss(SimpleNamespace(**heads), part)
            return losses.sum(), _detached(heads), statistics

        def token_loss(out, rows):
            seen = {name: head[rows] for name, head in heads.items()}
            return loss(SimpleNamespace(**vars(out), **seen), part.take(rows))

        # The entropy comes with the log-probs at no cost, and is worth watching.
        outputs = tuple(name for name in dict.fromkeys((*loss.outputs, "entropy")) if name not in {*places, *loss.made})
        hidden, reference = taken(states, packed.predictor).to(self.compute), self._taught_by(batch, loss)
        weight, terms = adapters.head_weight(model).to(hidden.dtype), adapters.head_terms(model)
        terms["temperature"] = part.extra.get("temperature", self.sampling.temperature or 1.0)
        terms["chunk"] = self.updating.chunk
        given = HeadInput(hidden, weight, part.tokens, terms, live, reference)
        heads |= {name: make(given) for name, make in loss.made.items()}
        value, out, statistics = linear_policy_loss(
            hidden,
            weight,
            part.tokens,
            token_loss,
            outputs=outputs,
            scope="token" if loss.scope == "token" else "rollout",
            offsets=batch.group_offsets if loss.scope == "group" else batch.offsets,
            live=live,
            params=tuple(heads.values()),
            reference=reference if {*outputs} & {*KINDS} else None,
            **terms,
        )
        return value, _detached({**vars(out), **heads}), statistics

    def _packed(self, batch: Batch, model, *, whole: bool = False) -> Packed | Padded:
        """A batch as a model can read it, on the host."""
        packs = adapters.base(model).config._attn_implementation == attention.NAME
        return batch.packed(whole=whole) if packs else padded(batch)

    def _states(self, packed: Packed | Padded, model) -> tuple[Tensor, Packed | Padded]:
        """A model's last hidden states over a packed batch, (L, D), and the batch where they are."""
        packed = packed.to(self.device)
        with self._autocast():
            return adapters.base(model).get_decoder()(**packed.inputs()).last_hidden_state.flatten(0, 1), packed

    def _taught_by(self, batch: Batch, loss: Loss) -> Reference | None:
        """What the divergences among a loss's outputs are from: the teacher's states at the batch's tokens."""
        if not (loss.made or {*loss.outputs} & {*KINDS}):
            return None
        found = []
        for share, second in self.seconds["teacher"].parts:
            with second.reading() as model:
                read = functools.partial(self._states, self._packed(batch.as_taught, model), model)
                given = model, self.model, read, self.compute
                found.append((share, second_models.reference(*given, **(loss.divergence or {}))))
        return second_models.mixed(found, adapters.head_terms(self.model)["softcap"])

    def _features(self, batch: Batch, model) -> Tensor:
        """The mean over each rollout's tokens of the states that have read them, (B, D) float32 on the host."""
        sums = torch.zeros(len(batch.group), adapters.head_weight(model).shape[1])
        for micro, counts in self._own(batch, torch.arange(len(batch.group))):
            part = batch.rollouts_at(micro)
            read = functools.partial(self._states, self._packed(part, model, whole=True), model)
            states, packed = sharding.inside(adapters.base(model), read)
            if counts:
                sums.index_add_(0, batch.rollout[batch.rows_of(micro)], states[packed.reader].float().cpu())
        return ranks.summed(sums) / batch.offsets.diff().clamp(min=1)[:, None]

    def _valued(self, states: Tensor) -> Tensor:
        """The value head at states (n, D), (n,) float32."""
        return self.value(states.float()).squeeze(-1)

    @contextlib.contextmanager
    def _reading(self, who: str):
        """The model that `ref`, `teacher` or `old` stands for; old is this one as it is."""
        if who == "old":
            yield self.model
            return
        with self.seconds[who].reading() as model:
            yield model

    def _autocast(self):
        # Weights cast once for all uses would outlive the pieces that FSDP2 frees.
        options = {"dtype": self.compute, "enabled": self.compute != torch.float32, "cache_enabled": not self._cut}
        return torch.autocast(self.device.type, **options)


def _taught(batch: Batch, loss: Loss) -> Tensor:
    """The rollouts with a token whose gradient is not known to be zero, (b,)."""
    live, index = loss.live(batch), torch.arange(len(batch.group))
    return index if live is None else index[batch.rollout_sum(live.float()) > 0]


def _detached(outputs: dict[str, Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**{name: value.detach() for name, value in outputs.items()})


def _attach(model) -> None:
    """Gives a model our products and lets it read packed rollouts, or warns; one that sees what comes is refused."""
    plain = adapters.base(layers.attach(model))
    reason = families.unsupported(plain)
    if reason is None or families.bidirectional(plain):
        attention.attach(plain)
    else:
        warnings.warn(f"Policy: updates read each rollout behind a prompt of its own, for {reason}.", stacklevel=3)
