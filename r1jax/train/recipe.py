# SPDX-License-Identifier: Apache-2.0
"""The R1 recipe from end to end (arXiv 2501.12948, figure 2), on generated tasks.

pretrain → cold_start → rl_1 → rejection sampling + sft_2 (from the pre-trained model) → rl_2 →
distillation of its correct traces into a Qwen2-shaped and a Llama-shaped student.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from r1jax.config import (
    DenseConfig,
    GRPOConfig,
    ModelConfig,
    RecipeConfig,
    RejectionConfig,
    RewardConfig,
    SFTConfig,
    to_config_dict,
)
from r1jax.data import corpus
from r1jax.data.packing import Packed
from r1jax.data.tasks import Problem
from r1jax.data.tokenizer import task_tokenizer
from r1jax.eval.heldout import evaluate
from r1jax.eval.report import write_picture, write_report
from r1jax.eval.summary import read_summary, with_provenance, write_summary
from r1jax.io import jsonl, metrics, outdir
from r1jax.nn.build import build
from r1jax.train import stages
from r1jax.train.collect import Collector
from r1jax.train.failure import StageFailed
from r1jax.train.judge import Judge, Rules, by_task
from r1jax.train.loop import Run, finish, finished, load
from r1jax.train.progress import Progress, Silent
from r1jax.train.questions import Asked
from r1jax.train.sampler import Sampler
from r1jax.train.state import TrainState, create
from r1jax.train.words import Words, template_of

Go = Callable[[TrainState], tuple[TrainState, int, float]]

ORDER = (
    "pretrain",
    "cold_start",
    "rl_1",
    "sft_2",
    "rl_2",
    "base_qwen2",
    "student_qwen2",
    "base_llama",
    "student_llama",
)


def run(
    cfg: RecipeConfig, out: str | Path, *, display: Progress | None = None, force: bool = False
) -> dict[str, Any]:
    """Runs every stage that is not finished yet and writes the summary and the report.

    Args:
        cfg: the whole recipe.
        out: folder of the run; a half-done run of the same config goes on where it stopped, and
            of a finished one the summary is read.
        display: is told what happens.
        force: start anew.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ValueError: the folder belongs to something else or another process is at work in it, or
            the config cannot be run.
        StageFailed: a stage has nothing to start from; the message names the field to change.
        KeyboardInterrupt: after saving.
    """
    recipe = Recipe(cfg, Path(out), display or Silent())
    with outdir.held(out, recipe.run.config, force=force) as found:
        return read_summary(out) if found == "finished" else recipe.all_stages()


class Recipe:
    """One run: the models, the data and the stages between them."""

    def __init__(self, cfg: RecipeConfig, out: Path, progress: Progress):
        self.cfg = cfg
        self.run = Run(out, to_config_dict(cfg).to_dict(), progress, cfg.checkpoint_every)
        tokenizer = task_tokenizer()
        check_vocabulary(cfg, tokenizer.vocab_size)
        self.words = Words(cfg.tasks, tokenizer, template_of(cfg.tasks))
        self.sampler = Sampler(cfg.sampling, self.words.ending())
        self.heldout = heldout(cfg, self.words)
        # What does not fit is refused here, before anything is trained or written.
        self.cold_start_rows = self.written_traces(cfg.cold_start)
        for problems in (self.heldout, self.words.problems(256, cfg.seed, "train")):
            self.sampler.prompts(self.words.asked(problems).ids)
        self.records: list[dict[str, Any]] = []

    def seed(self, stage: str) -> int:
        """A seed for each stage, far enough apart for one number a step."""
        return (self.cfg.seed * 64 + ORDER.index(stage)) * 1_000_000

    def all_stages(self) -> dict[str, Any]:
        """Runs the stages in order and writes what a run leaves behind."""
        cfg = self.cfg
        base = self.stage(
            "pretrain",
            self.fresh("pretrain", cfg.model),
            self.read("pretrain", cfg.pretrain, cfg.model),
        )
        state = self.stage("cold_start", base, self.cold_start)
        state = self.stage("rl_1", state, self.reinforce("rl_1", cfg.rl_1))
        traces = self.traces("sft_2", state, cfg.rejection)
        state = self.stage("sft_2", base, self.imitate("sft_2", cfg.sft_2, cfg.model, traces))
        state = self.stage("rl_2", state, self.reinforce("rl_2", cfg.rl_2))
        traces = self.traces("distill", state, cfg.distill_data)
        for name, model in (("qwen2", cfg.students.qwen2), ("llama", cfg.students.llama)):
            base = f"base_{name}"
            go = self.read(base, cfg.student_pretrain, model)
            state = self.stage(base, self.fresh(base, model), go, measured=False)
            student = f"student_{name}"
            self.stage(student, state, self.imitate(student, cfg.distill, model, traces))
        return self.leave_behind()

    def fresh(self, stage: str, model: ModelConfig | DenseConfig) -> TrainState:
        """A newly initialised model."""
        return create(lambda: build(model), optax.identity(), jax.random.key(self.seed(stage)))

    def stage(self, name: str, state: TrainState, go: Go, *, measured: bool = True) -> TrainState:
        """Runs and evaluates a stage, or takes what it left when it was finished before.

        Args:
            go: from a state to (state, steps, seconds); it must not consume the state it is given.
            measured: evaluate it and put it into the summary; a student's base model is not.
        """
        record = finished(self.run, name)
        if record is not None:
            if measured:
                self.records.append(record)
            return load(self.run, name, {"state": state.slim()})["state"]
        state, steps, seconds = go(state)
        state = state.slim()
        if not measured:
            finish(self.run, name, {"state": state}, steps, {"name": name, "seconds": seconds})
            return state
        figures, answers = evaluate(
            state,
            self.sampler,
            self.heldout,
            words=self.words,
            samples=self.cfg.evaluation.samples,
            seed=self.seed(name) + 999_999,
        )
        record = {
            "name": name,
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "steps": steps,
            "seconds": round(seconds, 4),
            **figures,
            "answers": answers[: self.cfg.evaluation.shown],
        }
        finish(self.run, name, {"state": state}, steps, record)
        self.records.append(record)
        self.run.progress.message(
            f"{name}: held-out pass@1 {figures['pass_at_1']:.1%}, greedy {figures['greedy']:.1%}, "
            f"format {figures['format_rate']:.1%}, {figures['mean_tokens']:.0f} tokens"
        )
        return state

    def read(self, stage: str, cfg: SFTConfig, model: ModelConfig | DenseConfig) -> Go:
        """Next-token training on raw task text: how a base model is made."""

        def go(state: TrainState):
            packed = corpus.pretrain_corpus(
                cfg.examples,
                seed=self.cfg.seed,
                tasks=self.words.mixture(),
                template=self.words.template,
                tokenizer=self.words.tokenizer,
                length=cfg.length,
                difficulty=self.cfg.tasks.difficulty,
            )
            return self._supervised(stage, state, packed, cfg, model)

        return go

    def cold_start(self, state: TrainState):
        """SFT on written chains of thought, some of them wrong, few of them reflecting."""
        cfg = self.cfg.cold_start
        return self._supervised("cold_start", state, self.cold_start_rows, cfg, self.cfg.model)

    def written_traces(self, cfg: SFTConfig) -> Packed:
        """The cold start's chains of thought, packed.

        Raises:
            ValueError: one is longer than a row.
        """
        return corpus.cold_start_corpus(
            cfg.examples,
            seed=self.cfg.seed,
            tasks=self.words.mixture(),
            mix=self.cfg.tasks.mix,
            template=self.words.template,
            tokenizer=self.words.tokenizer,
            length=cfg.length,
            difficulty=self.cfg.tasks.difficulty,
        )

    def reinforce(self, stage: str, cfg: GRPOConfig, judge: Judge | None = None) -> Go:
        """GRPO from the state given, with the recipe's rewards or a control's."""
        seed, words = self.seed(stage), self.words

        def questions(index: int, n: int, step: int) -> Asked:
            return words.asked(words.problems(n, seed + index, "train"))

        collector = Collector(
            cfg, self.sampler, questions, judge or self.judge(cfg.reward), seed=seed
        )
        speed = self.cfg.model.moe.bias_update_speed

        def go(state: TrainState):
            state, seconds = stages.grpo(self.run, stage, state, cfg, collector, bias_speed=speed)
            return state, cfg.steps, seconds

        return go

    def judge(self, cfg: RewardConfig) -> Judge:
        """The recipe's rewards; the tasks verify themselves."""
        template = self.words.template
        longest = self.cfg.sampling.max_new_tokens
        return Rules(cfg, template, by_task(template), max_length=longest)

    def imitate(
        self,
        stage: str,
        cfg: SFTConfig,
        model: ModelConfig | DenseConfig,
        traces: Callable[[], list[dict[str, str]]],
    ) -> Go:
        """SFT on kept traces."""

        def go(state: TrainState):
            packed = stages.pack_traces(traces(), self.words, length=cfg.length)
            return self._supervised(stage, state, packed, cfg, model)

        return go

    def traces(
        self, name: str, state: TrainState, cfg: RejectionConfig
    ) -> Callable[[], list[dict[str, str]]]:
        """The kept traces of a policy: sampled when first asked for, and read again ever after."""
        path = self.run.out / "traces" / f"{name}.jsonl"
        rows = self.cfg.rl_1.prompts * self.cfg.rl_1.group_size
        samples = cfg.samples if rows % cfg.samples == 0 else self.cfg.rl_1.group_size

        def get() -> list[dict[str, str]]:
            if not path.exists():
                kept = stages.rejection_sample(
                    self.run,
                    f"{name}: rejection sampling",
                    state,
                    cfg,
                    self.sampler,
                    words=self.words,
                    batch=(rows // samples, samples),  # as many rows as in RL
                    seed=self.seed("sft_2" if name == "sft_2" else "student_qwen2"),
                )
                if not kept:
                    raise StageFailed(nothing_kept(name, cfg))
                jsonl.write(path, kept)
            return jsonl.read(path)

        return get

    def leave_behind(self) -> dict[str, Any]:
        """Writes samples, report, picture and, last, the summary: it marks the run finished."""
        out, by_name = self.run.out, {r["name"]: r for r in self.records}
        before, after = by_name["cold_start"]["answers"], by_name["rl_2"]["answers"]
        samples = [
            {
                "question": b["question"],
                "before": b["text"],
                "after": a["text"],
                "before_correct": b["correct"],
                "after_correct": a["correct"],
            }
            for b, a in zip(before, after, strict=True)
        ]
        records = [{k: v for k, v in r.items() if k != "answers"} for r in self.records]
        summary = with_provenance(
            {"stages": records, "seed": self.cfg.seed, "config": self.run.config}
        )
        rows = metrics.read(out / "metrics.jsonl")
        outdir.write_json(out / "samples.json", samples)
        write_report(out, summary, rows, samples)
        write_picture(out / "curves.png", summary, rows)
        return write_summary(out, summary)

    def _supervised(self, stage, state, packed: Packed, cfg: SFTConfig, model):
        state, seconds = stages.supervised(
            self.run, stage, state, packed, cfg, model=model, seed=self.seed(stage)
        )
        return state, cfg.steps, seconds


def heldout(cfg: RecipeConfig, words: Words) -> list[Problem]:
    """The problems that every stage is measured on.

    Raises:
        ValueError: the tasks do not have as many.
    """
    try:
        return words.problems(cfg.evaluation.problems, cfg.seed, "heldout", unique=True)
    except ValueError as error:
        raise ValueError(f"evaluation.problems={cfg.evaluation.problems}: {error}") from error


def nothing_kept(name: str, cfg: RejectionConfig) -> str:
    """Why a stage cannot be trained on rejection-sampled traces, and what to change."""
    field, teacher = {"sft_2": ("rejection", "rl_1"), "distill": ("distill_data", "rl_2")}[name]
    return (
        f"{name}: rejection sampling kept nothing: no right and well-formed completion of "
        f"{cfg.problems} problems; raise {teacher}.steps, {field}.problems or {field}.samples and "
        "start anew with --force or another --out"
    )


def check_vocabulary(cfg: RecipeConfig, size: int) -> None:
    """Refuses a model that lacks a row for some token.

    Raises:
        ValueError: naming the field.
    """
    for name, model in cfg.models():
        if model.vocab_size < size:
            raise ValueError(
                f"{name}.vocab_size={model.vocab_size} is smaller than the tokenizer's {size} "
                f"tokens; set {name}.vocab_size to {size} or more"
            )
