# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say, one schema per job: YAML -> frozen dataclasses. Imports no torch, so a mistake is reported in
milliseconds.

`RlConfig` and `SftConfig` share `JobConfig`. `CacheConfig` is the part that filling the cache reads of either, so that
`megatron_rl.cache_videos` takes the very recipe that will run. A field without a default is required. io.py reads a
recipe, applies `key.path=value` overrides and reports every problem at once; checks.py holds the checks that span
several fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    hf: str
    """Folder of a Hugging Face checkpoint: config, tokenizer, weights."""
    weights_from: str = ""
    """Megatron checkpoint folder (a `step_N` or a run's `checkpoints`) to start from; empty = the weights in `hf`."""
    freeze_vision: bool = True
    """Keep the vision tower and its projector fixed; false trains what `train_vision` names."""
    train_vision: Literal["all", "tower", "projector"] = "all"
    """What is trained where freeze_vision is false: the tower, the projector behind it, or both."""
    freeze: tuple[str, ...] = ()
    """Language-model parameters that are not trained, by Megatron name with wildcards: "embedding.*"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Parameter and compute type; auto = bfloat16 on a GPU, float32 on a CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the trainer: selective = the feed-forward part, full = whole layers."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Where the usual names (docs/data.md) do not fit: the column of each field."""

    problem: str = ""
    """Column of the question; empty = the first of problem, question, prompt."""
    answer: str = ""
    """Column of the answer; empty = answer or solution, or the last turn of a conversation."""
    messages: str = ""
    """Column of conversations; empty = the first of messages, conversations, prompt that holds turns."""
    options: str = ""
    """Column of the options of a question; empty = options."""
    system: str = ""
    """Column of the system prompt; empty = system, or the system turn of a conversation."""
    problem_type: str = ""
    """Column of a label; empty = problem_type."""
    videos: str = ""
    """Column of the videos, or a path made of columns: "clips/{id}.mp4"; empty = videos or video."""
    images: str = ""
    """Column of the images, or a path made of columns; empty = images or image."""
    audios: str = ""
    """Column of the sounds, or a path made of columns; empty = audios or audio."""
    video_start: str = ""
    """Column of the second at which the part of the videos begins; empty = video_start."""
    video_end: str = ""
    """Column of the second at which it ends; empty = video_end."""
    fps: str = ""
    """Column of the rate of videos that are lists of frames; empty = fps."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = ""
    """Data sets with commas between: a JSONL, JSON or Parquet file, a folder of them, or owner/name on the Hugging Face
    hub; `@split` behind the last two. Fields: `problem`, `answer`; optionally `videos`, `images`, `options`, `system`,
    `video_start` and `video_end` (seconds), `problem_type`; or conversations (docs/data.md)."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    turns: Literal["last", "all"] = "last"
    """Which answers of a conversation are learned: the last one, or all, each as a row of its own with the turns before
    it as its prompt."""
    weights: tuple[float, ...] = ()
    """How often rows of each data set in `train` are drawn, relative; empty = each row once an epoch."""
    eval: str = ""
    """Data sets to evaluate on, as in `train`; empty = no evaluation."""
    media_root: str = ""
    """Folder against which relative media paths are resolved; empty = the folder of the data set."""
    format_prompt: str = ""
    """Jinja file rendered with `content` = the problem; empty = the problem as it is."""
    num_frames: int = 32
    """Frames taken uniformly from each video; 0 = use `fps`."""
    fps: float = 0.0
    """Frames a second to take when num_frames is 0."""
    min_frames: int = 4
    """Lower bound on the frames taken by `fps` (a clip with fewer gives each once)."""
    max_frames: int = 8192
    """Upper bound on the frames taken by `fps`."""
    frame_rule: Literal["time", "processor"] = "time"
    """time: by timestamp; processor: the very frames that the Hugging Face processor of the model would take."""
    min_pixels: int = 100_352
    """Smallest frame area after resizing."""
    max_pixels: int = 602_112
    """Largest frame area after resizing."""
    total_pixels: int = 0
    """Largest area of all frames of a video together: long videos get smaller frames; 0 = no such bound."""
    max_prompt_tokens: int = 4096
    """Prompts longer than this (video tokens included) are set aside and counted, never cut."""
    shuffle: bool = True
    """Reshuffle every epoch, by (seed, epoch)."""
    max_bad_fraction: float = 0.2
    """The run stops when more than this part of a batch had to be set aside."""
    manifest: str = ""
    """File of sha256 sums (as `sha256sum` writes it) that every media file must match; empty = not checked."""
    prefetch_mib: int = 1024
    """Decoded frames of the next batch that a rank may hold while the engine generates; 0 = decode when needed."""
    decode_threads: int = 1
    """Decoder threads per rank."""
    frames_per_chunk: int = 64
    """Frames of a video that a rank puts through the vision tower, and receives from another one, at a time: bounds
    the memory of encoding."""
    cache_dir: str = ""
    """Folder that keeps video embeddings for later steps and runs, which may share it; empty = none are kept."""
    cache_gib: float = 100.0
    """Size that the cache folder may grow to, in GiB; what was used longest ago goes first."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    """Tensor parallel size of the trainer (sequence parallel is on whenever it is above 1)."""
    pipeline: int = 1
    """Pipeline parallel size of the trainer."""
    virtual_pipeline: int = 1
    """Model chunks a pipeline stage holds (Megatron-core's interleaved schedule); needs pipeline above 2."""
    context: int = 1
    """Context parallel size of the trainer: the tokens of a micro-batch are spread over that many ranks."""
    context_comm: Literal["all_gather", "p2p", "a2a"] = "all_gather"
    """How context parallel ranks exchange keys and values: all at once, round a ring, or heads against tokens."""
    expert: int = 1
    """Expert parallel size of the trainer, for mixture-of-experts models; a divisor of tensor * data parallel."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    tensor: int = 1
    """Tensor parallel size of vLLM; the other ranks form replicas."""
    num_samples: int = 8
    """Responses per prompt."""
    temperature: float = 1.0
    """Sampling temperature, at least 0.01; the trainer scores at the same temperature."""
    max_response_tokens: int = 1024
    """A response that reaches this length is truncated (counted in response_length/clip_ratio)."""
    truncated: Literal["keep", "mask"] = "keep"
    """Truncated responses: keep them in the loss, or mask them out (DAPO's overlong filtering)."""
    max_model_len: int = 0
    """Engine limit on prompt + response; 0 = data.max_prompt_tokens + max_response_tokens."""
    max_num_seqs: int = 256
    """Sequences decoded together by one replica."""
    kv_cache_gib: float = 0.0
    """KV-cache memory of one rank in GiB; 0 = on a GPU vLLM takes what `gpu_memory_utilization` leaves, on a CPU what
    `max_num_seqs` sequences of `max_model_len` tokens need, within this rank's share of that part of the memory."""
    gpu_memory_utilization: float = 0.6
    """Part of the device memory (on a CPU: of the memory of all ranks there) that vLLM may use while awake."""
    enforce_eager: bool = False
    """No compilation, no CUDA graphs: slower generation, faster start. On a CPU it is always so: compiling gains
    nothing there."""
    sync_buffer_mib: int = 256
    """Bound on the extra memory of one weight sync."""
    verify_sync: bool = False
    """Compare checksums of every piece of every weight after each sync."""
    save_to: str = ""
    """Write the groups of every step to this folder."""
    replay_from: str = ""
    """Train on rollouts saved before; no engine is built."""
    only: bool = False
    """Generate and score, do not train (with `save_to`)."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Advantage of a response with reward r in the group of its prompt. grpo: (r - mean) / std; dr_grpo: r - mean;
    rloo: r - mean of the others."""
    loss: Literal["ppo_clip"] = "ppo_clip"
    """Policy loss; ppo_clip: PPO's clipped objective with the bounds below."""
    loss_average: Literal["token", "sequence"] = "token"
    """token: every response token of the global batch weighs the same; sequence: every response does."""
    clip_low: float = 0.2
    """Lower clip of the probability ratio: 1 - clip_low."""
    clip_high: float = 0.3
    """Upper clip: 1 + clip_high (DAPO's clip-higher)."""
    clip_dual: float = 3.0
    """Dual clip: where the advantage is negative, the loss of a token is at most -advantage * clip_dual."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss; 0 = no reference is kept."""
    kl_kind: Literal["k1", "abs", "k2", "k3"] = "k3"
    """Estimator of the KL, with d = log p_ref - log p (Schulman 2020): k1 = -d, abs = |d|, k2 = d^2 / 2, k3 = exp(d) -
    d - 1."""
    correction: Literal["none", "tis"] = "none"
    """For the mismatch of trainer and engine: tis = truncated importance sampling of each token."""
    correction_cap: float = 2.0
    """Largest factor that the correction gives a token."""
    filter_groups: bool = False
    """DAPO's dynamic sampling: drop groups whose mean reward is outside (filter_low, filter_high)."""
    filter_low: float = 0.01
    """Groups whose mean reward is not above this are dropped by filter_groups."""
    filter_high: float = 0.99
    """Groups whose mean reward is not below this are dropped by filter_groups."""
    max_filter_rounds: int = 20
    """Rollout rounds spent on filling a batch with informative groups before giving up."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    name: str = "r1v"
    """A built-in reward (math, r1v, exact) or `path/to/file.py:function`."""
    terms: dict[str, float] = field(default_factory=dict)
    """Weights of the reward's named parts in the overall reward; a part without one is only logged. Empty = the
    reward's own weights, {accuracy: 0.9, format: 0.1} for math and r1v, {accuracy: 1.0} for exact; a function of your
    own then returns `overall` itself."""
    missing_answer: Literal["default", "wrong", "whole_response"] = "default"
    """What a response without an <answer> span is for r1v and exact: wrong, or its whole text is the answer. default:
    wrong for r1v, whole_response for exact."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Learning rate, constant after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 0
    """Steps of linear warm-up: step k (from 0) uses lr * min(1, (k + 1) / warmup_steps)."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm, over all parameters, are scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    prompts_per_step: int = 128
    """Prompts of one rollout batch (rows of one batch in SFT), over all ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(BatchConfig):
    num_steps: int
    """Steps of the run: rollout batches in RL, batches in SFT."""
    updates_per_step: int = 1
    """Optimizer updates made from one rollout batch."""
    max_tokens_per_microbatch: int = 16_384
    """Token budget of one packed micro-batch, over all its context parallel ranks; a shared prompt counts once."""
    share_prefix: bool = True
    """Store and compute the prompt of a group once for all its responses; gradients are the same without."""
    offload_optimizer: bool = False
    """Optimizer state in host memory except during its own step. In RL that is so for the first update of a step in
    any case, since the state waits there while the engine works; this is for SFT and for further updates."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class SftTrainConfig(TrainConfig):
    max_answer_tokens: int = 1024
    """Answers longer than this (the end-of-turn token included) are set aside and counted, never cut."""
    loss_average: Literal["token", "sequence"] = "token"
    """token: every answer token of the global batch weighs the same; sequence: every answer does."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Evaluate after every so many steps, too; 0 = only as at_start and at_end say."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    batch_size: int = 64
    """Prompts generated together."""
    blind: bool = False
    """At the end also evaluate with every frame blanked: what can be guessed without looking."""
    show: int = 5
    """Sample rollouts printed at the end."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Save after every so many steps; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    best_metric: str = "eval/accuracy"
    """Metric whose highest value marks the best checkpoint."""
    save_at_end: bool = True
    """Save after the last step."""
    export_hf: bool = False
    """Write the final weights as a Hugging Face folder into the run directory."""
    resume: bool = True
    """Go on from the newest checkpoint in the run directory, if there is one."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases: offline writes files that `wandb sync` uploads later; online needs a login."""
    project: str = "megatron_rl"
    """Project of Weights & Biases."""
    tensorboard: bool = True
    """Write files for TensorBoard."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What filling the cache reads of a recipe for another job."""

    run_dir: str
    """Folder of this run: resolved config, metrics, checkpoints, plots."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPUs if there are any."""
    max_phase_minutes: float = 0.0
    """A phase of a step that lasts longer ends the job, with the stack of each rank: something is stuck. 0 = never;
    what is unusually long is told once in any case."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: BatchConfig


@dataclass(frozen=True, kw_only=True)
class JobConfig(CacheConfig, ABC):
    """What every job that trains has."""

    seed: int = 1
    """Of the order of rows and of sampling."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and response (or answer) together."""


@dataclass(frozen=True, kw_only=True)
class RlConfig(JobConfig):
    """megatron_rl.train"""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def max_model_len(self) -> int:
        return self.rollout.max_model_len or self.data.max_prompt_tokens + self.rollout.max_response_tokens


@dataclass(frozen=True, kw_only=True)
class SftConfig(JobConfig):
    """megatron_rl.sft"""

    train: SftTrainConfig

    @property
    def max_model_len(self) -> int:
        return self.data.max_prompt_tokens + self.train.max_answer_tokens
