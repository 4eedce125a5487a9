"""Options of vLLM's engine that are not here: each is refused, or taken and said to change nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VllmOption:
    """Flags of vLLM's that share a reason, which goes on from "not supported; " or "has no effect; "."""

    flags: tuple[str, ...]  # as on the command line; keyword arguments have the same names with underscores
    why: str
    harmless: tuple[str, ...] = ()  # values that ask for what is so anyway, in lower case
    is_switch: bool = False  # takes no value on the command line, and has a --no- form
    is_needless: bool = False  # taken: it is about how vLLM works, and no answer would be another one

    def asks_for_nothing(self, value: object) -> bool:
        """Whether `value` needs no word."""
        return value is None or str(value).lower() in (self.harmless or ("false",))

    def sentence(self, said: str) -> str:
        """What to tell whoever `said` it on a command line."""
        return f"{said}: {'has no effect' if self.is_needless else 'not supported'}; {self.why}"

    def keyword_sentence(self, said: str) -> str:
        """What to tell whoever `said` it in Python."""
        return re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), self.sentence(said))


def refused(flags: str, why: str, *harmless: str) -> VllmOption:
    """Flags with a value that are refused unless it is `harmless`."""
    return VllmOption(tuple(flags.split()), why, harmless)


def refused_switch(flags: str, why: str) -> VllmOption:
    """Switches that are refused when they are on."""
    return VllmOption(tuple(flags.split()), why, is_switch=True)


def needless(flags: str, why: str, *harmless: str) -> VllmOption:
    """Flags with a value that are taken, with a word unless it is `harmless`."""
    return VllmOption(tuple(flags.split()), why, harmless, is_needless=True)


def needless_switch(flags: str, why: str, *harmless: str) -> VllmOption:
    """Switches that are taken; "true" as `harmless` for what is always on."""
    return VllmOption(tuple(flags.split()), why, harmless, is_switch=True, is_needless=True)


_LORA = "LoRA adapters are not served yet: merge the adapter into the weights first"
_SPECULATION = "there is no speculative decoding yet; leave it out"
_CONFIG = "edit config.json in a copy of the model instead"
_DEALING = (
    "--data-parallel-size engines of one process share a port; for more, start several servers behind a proxy"
)
_COMPILED = "every step is compiled ahead of time"
_KERNELS = "kernels are chosen by the device"
_LLGUIDANCE = "constraints are always compiled by llguidance"
_POOLING = "this server generates text, and makes no embeddings, scores or classes"
_TRACES = "there are no traces; see /metrics and the log"

ENGINE_OPTIONS: tuple[VllmOption, ...] = (
    # What would be answered otherwise, or by something that is not here.
    refused(
        "--quantization -q",
        "weights run in --dtype; a quantised GGUF file is dequantised when it is loaded",
        "none",
    ),
    refused(
        "--pipeline-parallel-size -pp",
        "every device has a part of every layer (--tensor-parallel-size); leave it out (or give 1)",
        "1",
    ),
    refused(
        "--decode-context-parallel-size -dcp --prefill-context-parallel-size -pcp",
        "every device has whole sequences; leave it out (or give 1)",
        "1",
    ),
    refused("--speculative-config -sc", _SPECULATION, "{}"),
    refused("--speculative-model --num-speculative-tokens --ngram-prompt-lookup-max", _SPECULATION),
    refused("--cpu-offload-gb --kv-offloading-size", "all stays on the device; leave it out", "0", "0.0"),
    refused("--num-gpu-blocks-override", "give --kv-cache-memory instead"),
    refused_switch("--trust-remote-code", "code from checkpoints is never run; leave it out"),
    refused_switch("--enable-lora --enable-lora-bias --fully-sharded-loras", _LORA),
    refused("--lora-modules --default-mm-loras", _LORA),
    refused("--max-loras --max-lora-rank --max-cpu-loras --lora-dtype --lora-extra-vocab-size", _LORA),
    refused("--code-revision", "code from checkpoints is never run; leave it out"),
    refused("--tokenizer-revision", "give --tokenizer a directory that holds it", "main"),
    refused("--hf-token", "set the environment variable HF_TOKEN"),
    refused("--download-dir", "set the environment variable HF_HUB_CACHE to the directory"),
    refused("--hf-config-path --hf-overrides --rope-scaling --rope-theta", _CONFIG, "{}"),
    refused("--config-format", "the config is read in Hugging Face's format; leave it out", "auto", "hf"),
    refused(
        "--tokenizer-mode", "the Hugging Face tokenizer is used; leave it out (or give auto)", "auto", "hf"
    ),
    refused_switch(
        "--skip-tokenizer-init", "prompts may be token ids, with the tokenizer there; leave it out"
    ),
    refused("--model-impl", "there is one implementation of each model; leave it out (or give auto)", "auto"),
    refused(
        "--device", "JAX takes the accelerator it finds; JAX_PLATFORMS=cpu, say, chooses another", "auto"
    ),
    refused("--runner --task --convert", _POOLING, "auto", "generate", "none"),
    refused("--pooler-config --override-pooler-config --io-processor-plugin", _POOLING),
    refused("--override-attention-dtype", "attention runs in --dtype"),
    refused_switch("--disable-sliding-window", "windows are the model's; set --max-model-len to the window"),
    refused("--logprobs-mode", "log-probabilities are those of the raw logits", "raw_logprobs"),
    refused(
        "--logits-processors --logits-processor-pattern", "requests have logit_bias and allowed_token_ids"
    ),
    refused_switch("--enable-prompt-embeds", "prompts are text or token ids"),
    refused_switch("--enable-sleep-mode", "stop the server, and start it again when it is needed"),
    refused("--model-loader-extra-config --additional-config", "leave it out", "{}"),
    refused(
        "--mamba-cache-dtype --mamba-ssm-cache-dtype --mamba-block-size", "no model here has such layers"
    ),
    refused_switch("--kv-sharing-fast-prefill", "no model here shares keys and values between layers"),
    refused_switch("--calculate-kv-scales", "keys and values of 8 bits have no scales; leave it out"),
    refused(
        "--structured-outputs-config", f"{_LLGUIDANCE}; --reasoning-parser NAME has a flag of its own", "{}"
    ),
    refused_switch(
        "--guided-decoding-disable-any-whitespace --guided-decoding-disable-additional-properties",
        "requests say so: structured_outputs has disable_any_whitespace and disable_additional_properties",
    ),
    refused(
        "--data-parallel-rank -dpn --data-parallel-start-rank -dpr --data-parallel-size-local -dpl "
        "--data-parallel-address -dpa --data-parallel-rpc-port -dpp",
        _DEALING,
    ),
    refused_switch("--data-parallel-hybrid-lb --data-parallel-external-lb", _DEALING),
    refused("--data-parallel-backend -dpb", _DEALING, "mp"),
    refused(
        "--distributed-executor-backend",
        "one process has all devices of a machine; --nnodes lays a model over several",
        "mp",
        "uni",
        "none",
    ),
    refused_switch("--enable-eplb --eplb-log-balancedness", "experts stay where they are; leave it out"),
    refused(
        "--eplb-config --num-redundant-experts --eplb-window-size --eplb-step-interval",
        "experts stay where they are; leave it out",
        "{}",
        "0",
    ),
    refused("--worker-cls --worker-extension-cls --scheduler-cls", "there is one; leave it out", "auto"),
    refused(
        "--kv-transfer-config --kv-events-config --ec-transfer-config",
        "prefill and decode run in one engine; leave it out",
        "{}",
    ),
    refused("--max-num-partial-prefills --max-long-partial-prefills", "leave it out (or give 1)", "1"),
    refused("--long-prefill-token-threshold", "leave it out (or give 0)", "0"),
    refused("--stream-interval", "a chunk of a stream has what there is; leave it out (or give 1)", "1"),
    refused("--otlp-traces-endpoint --collect-detailed-traces", _TRACES),
    refused("--show-hidden-metrics-for-version", "no metric is hidden; leave it out"),
    refused_switch("--ray-workers-use-nsight", "there are no Ray workers; leave it out"),
    refused("--media-io-kwargs", "images are decoded in one way; leave it out", "{}"),
    refused_switch("--enable-mm-embeds", "images are taken, not embeddings of them; leave it out"),
    refused("--video-pruning-rate", "videos are not taken; leave it out", "0", "0.0"),
    # How vLLM does its work: answers are the same without.
    needless("--swap-space --preemption-mode", "preempted sequences are recomputed, not swapped", "0"),
    needless_switch("--enforce-eager", _COMPILED),
    needless(
        "--compilation-config -O -cc --optimization-level --cudagraph-capture-sizes --cuda-graph-sizes "
        "--max-cudagraph-capture-size --max-seq-len-to-capture",
        _COMPILED,
        "{}",
    ),
    needless(
        "--attention-backend --attention-config -ac --mm-encoder-attn-backend --moe-backend --all2all-backend",
        _KERNELS,
        "auto",
        "{}",
    ),
    needless_switch(
        "--disable-custom-all-reduce --disable-cascade-attn --enable-flashinfer-autotune", _KERNELS
    ),
    needless_switch("--enable-dbo --disable-nccl-for-dp-synchronization", _KERNELS),
    needless("--dbo-decode-token-threshold --dbo-prefill-token-threshold", _KERNELS),
    needless("--expert-placement-strategy", "experts are laid out in order", "linear"),
    needless_switch("--enable-chunked-prefill", "long prompts always take several steps", "true"),
    needless_switch("--async-scheduling", "the next step is always scheduled while one runs", "true"),
    needless("--num-scheduler-steps --num-lookahead-slots", "steps are joined where nothing waits", "0", "1"),
    needless_switch(
        "--multi-step-stream-outputs --disable-async-output-proc", "tokens are told as they come"
    ),
    needless(
        "--scheduling-policy",
        "the lowest priority of a request goes first, then the oldest",
        "fcfs",
        "priority",
    ),
    needless_switch("--disable-chunked-mm-input", "an image is always encoded whole"),
    needless_switch("--disable-hybrid-kv-cache-manager --use-v2-block-manager", "there is one kind of pages"),
    needless("--prefix-caching-hash-algo", "pages are told apart by BLAKE2", "builtin"),
    needless(
        "--max-parallel-loading-workers --safetensors-load-strategy", "weights load straight to devices"
    ),
    needless("--pt-load-map-location --ignore-patterns", "of a checkpoint, only what is needed is read"),
    needless_switch("--use-tqdm-on-load", "progress is told on stderr", "true"),
    needless("--guided-decoding-backend", _LLGUIDANCE, "auto", "guidance"),
    needless_switch("--guided-decoding-disable-fallback", _LLGUIDANCE),
    needless_switch(
        "--disable-log-stats --aggregate-engine-logging",
        "statistics are not logged; /metrics has them anyway",
    ),
    needless(
        "--mm-processor-cache-gb --mm-processor-cache-type --mm-shm-cache-max-object-size-mb",
        "prepared images are not kept",
        "0",
    ),
    needless_switch("--disable-mm-preprocessor-cache", "prepared images are not kept"),
    needless_switch("--skip-mm-profiling", "memory for images is planned, not tried out"),
    needless("--mm-encoder-tp-mode", "the vision tower is laid out like the model", "weights"),
    needless_switch(
        "--enable-multimodal-encoder-data-parallel", "the vision tower is laid out like the model"
    ),
    needless_switch("--interleave-mm-strings", "images stay where they are among the texts", "true"),
)


def engine_keyword(name: str) -> VllmOption | None:
    """The option that vLLM's LLM(…) takes under that name, if it is one that we do not have."""
    flag = "--" + name.replace("_", "-")
    return next((option for option in ENGINE_OPTIONS if flag in option.flags), None)
