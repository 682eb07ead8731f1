"""The memory plan: by hand, beside what the learner and vLLM really hold on a CPU, and as docs/engines.md shows it."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import memory_table
from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import LoRAConfig, LossConfig, OptimizerConfig
from fdpg_fast.contexts import Context
from fdpg_fast.engines import VLLMEngine, plan
from fdpg_fast.engines.plan import kv_bytes_per_token, plan_cpu_cache, plan_memory
from fdpg_fast.errors import UserError
from fdpg_fast.learner import Learner
from fdpg_fast.models.language_model import LanguageModel, load_model
from fdpg_fast.models.lora import LoRAPolicy
from fdpg_fast.rollouts import Rollouts
from fdpg_fast.session import Sharing, plan_on_gpu
from fdpg_kernels import chunked, divergences
from support.storages import Storages
from support.vllm_cases import EOS, save_model

GIB = 2**30
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA_8B = memory_table.MODELS["Llama-3.1-8B"]
PARAMETERS = {  # as published with the weights
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
}
SMALL = dict(
    num_parameters=134_515_008,
    dtype=torch.bfloat16,
    device_bytes=24 * GIB,
    max_length=512,
    micro_batch_tokens=4096,
    max_sequences=256,
    shared_weights=False,
    sleeps=False,
)
LARGE = SMALL | dict(num_parameters=8_030_261_248, device_bytes=192 * GIB, max_length=2048, max_sequences=1000)


def small(**changes):
    return plan_memory(SMOLLM2, **(SMALL | changes))


def large(**changes):
    return plan_memory(LLAMA_8B, **(LARGE | changes))


def parts(planned):
    """Bytes that live at once while vLLM keeps what it has."""
    names = "policy base optimizer gradients activations engine_weights engine_work reserve kv_cache"
    return sum(getattr(planned, name) for name in names.split())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_on_the_meta_device(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory_table.MODELS.get(name, SMOLLM2))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (SMOLLM2, torch.bfloat16, 23_040),  # 2 · 30 layers · 3 heads · 64 · 2 bytes
        (SMOLLM2, torch.float32, 46_080),
        (LLAMA_8B, torch.bfloat16, 131_072),  # 2 · 32 · 8 · 128 · 2
        (memory_table.MODELS["Qwen2.5-0.5B"], torch.bfloat16, 12_288),  # 2 · 24 · 2 · 64 · 2
    ],
)
def test_keys_and_values_of_a_token(config, dtype, expected):
    assert kv_bytes_per_token(config, dtype) == expected


def test_smollm2_on_24_gib_by_hand():
    assert small() == plan.MemoryPlan(
        device=25_769_803_776,
        policy=269_030_016,
        base=269_030_016,
        optimizer=1_614_180_096,  # 12 bytes a parameter
        gradients=269_030_016 + 113_246_208,  # and V·D in float32
        activations=3_538_944_000 + 402_653_184,  # 4,096 · 30 · (4·1536 + 6·576 + 5·15·64) · 2, and 4,096 rows of V
        engine_weights=269_030_016,
        engine_work=245_366_784 + 226_492_416,  # 16,384 · (5·576 + 3·1536) · 2, and 256 · V · 18
        reserve=3_221_225_472,
        kv_cache=3_020_267_520,  # 256 · 32 + 1 blocks of 16 tokens
        tokens_cached=131_072,
        sequences=256,
    )


def test_llama_8b_on_192_gib_by_hand():
    awake = large()
    assert awake == plan.MemoryPlan(
        device=206_158_430_208,
        policy=16_060_522_496,
        base=16_060_522_496,
        optimizer=96_363_134_976,
        gradients=16_060_522_496 + 2_101_346_304,
        activations=29_527_900_160 + 1_050_673_152,
        engine_weights=16_060_522_496,
        engine_work=2_080_374_784 + 2_308_608_000,
        reserve=3_221_225_472,
        kv_cache=2_509 * 2_097_152,
        tokens_cached=2_508 * 16,
        sequences=19,
    )
    asleep = large(sleeps=True)  # 54,003,519,488 bytes are left: 25,750 blocks, of 128 a sequence
    assert asleep == replace(awake, kv_cache=54_001_664_000, tokens_cached=411_984, sequences=201)


def test_float32_has_no_master_weights_and_chunked_loss():
    planned = small(dtype=torch.float32)
    assert planned.optimizer == 8 * 134_515_008 and planned.gradients == planned.policy == 4 * 134_515_008
    assert planned.activations == 4096 * 1_728_000 + chunked.BLOCK_BYTES == 4096 * 1_728_000 + plan.CHUNKED_LOSS_BYTES


def test_the_loss_takes_the_block_that_the_kernels_allocate():
    head = pytest.importorskip("fdpg_kernels.triton.head")
    assert (plan.LOSS_ROWS, plan.LOSS_BYTES) == (head.CHUNK_ROWS, head.CHUNK_BYTES)


def test_what_is_planned_fits_and_nothing_is_left_idle():
    block = 16 * 131_072
    for shared in (True, False):
        awake = large(shared_weights=shared)
        assert 0 <= awake.device - parts(awake) < block
        asleep = large(shared_weights=shared, sleeps=True)
        updating = asleep.gradients + asleep.activations
        sampling = asleep.engine_weights + asleep.engine_work + asleep.kv_cache
        kept = parts(asleep) - updating - sampling
        assert 0 <= asleep.device - kept - max(updating, sampling) < block


def test_more_room_never_means_fewer_sequences():
    settings = [
        [dict(device_bytes=gib * GIB) for gib in (24, 32, 40, 80)],
        [dict(max_length=length) for length in (8192, 4096, 2048)],
        [dict(micro_batch_tokens=tokens) for tokens in (16_384, 8192, 4096, 2048, 1)],
        [dict(), dict(shared_weights=True), dict(sleeps=True)],
        [dict(dtype=torch.float32), dict()],
    ]
    for series in settings:
        defaults = dict(device_bytes=32 * GIB, max_length=4096, max_sequences=1000)
        found = [small(**(defaults | changes)).sequences for changes in series]
        assert found == sorted(found) and found[0] < found[-1], series


def test_activations_hold_a_sequence_longer_than_the_micro_batch():
    assert small(micro_batch_tokens=1).activations == small(micro_batch_tokens=512).activations
    assert small(micro_batch_tokens=513).activations == small(micro_batch_tokens=512).activations + 864_000


def test_an_engine_elsewhere_takes_nothing_here():
    planned = small(max_sequences=0)
    assert planned.engine_weights == planned.engine_work == planned.kv_cache == planned.sequences == 0
    assert "key-value" not in planned.describe()


@pytest.mark.parametrize("sleeps", [True, False])
def test_one_sequence_fits_or_the_missing_byte_is_reported(sleeps):
    """The least GPU holds everything that lives at once and 33 blocks: 32 for 512 tokens, one that vLLM keeps."""
    cache = 33 * 16 * 23_040
    planned = small(sleeps=sleeps)
    fixed = parts(planned) - planned.kv_cache
    if sleeps:  # the update is the larger of the two phases
        cache = 0
        fixed -= planned.engine_weights + planned.engine_work
    least = small(sleeps=sleeps, device_bytes=fixed + cache)
    assert least.sequences >= 1 and (sleeps or least.kv_cache == cache)
    with pytest.raises(UserError, match="9.31e-10 too few for sequences of 512 tokens"):
        small(sleeps=sleeps, device_bytes=fixed + cache - 1)


def test_too_little_memory_says_how_much_is_missing_and_what_helps():
    with pytest.raises(UserError) as error:
        small(device_bytes=8 * GIB, max_length=2048)
    text = str(error.value)
    missing = parts(small()) - small().kv_cache + 129 * 16 * 23_040 - 8 * GIB
    assert f"device: 8 GiB of memory are {missing / GIB:.3g} too few for sequences of 2,048 tokens" in text
    assert all(word in text for word in ("policy 0.251", "activations 3.67", "keys and values of one 0.0443"))
    helps = text.partition("what helps: ")[2].split(", ")
    assert helps == ["fewer trainer.micro_batch_tokens", "a LoRA adapter (lora.rank)", "a smaller model"]
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(dtype=torch.float32, device_bytes=12 * GIB), "dtype: bfloat16"),
        (dict(device_bytes=10_000_000_000), "engine.share_weights: false with trainer.pipeline_depth: 0"),
        (dict(device_bytes=10_000_000_000), "engine.kind: vllm_server"),
        (dict(device_bytes=10_000_000_000), "fewer engine.max_new_tokens"),
        (dict(device_bytes=4 * GIB, max_sequences=0), "a smaller model"),
    ],
)
def test_what_helps(changes, expected):
    if "dtype" in changes:
        assert small(device_bytes=12 * GIB).sequences  # so it would
    with pytest.raises(UserError, match="what helps: ") as error:
        small(**changes)
    assert expected in str(error.value)
    if "share_weights" in expected:
        assert small(**changes, sleeps=True).sequences


def test_fewer_tokens_are_not_offered_where_the_weights_alone_are_too_many():
    with pytest.raises(UserError) as error:
        large(device_bytes=141 * GIB, max_length=8192)
    assert str(error.value).endswith("what helps: a LoRA adapter (lora.rank), a smaller model")


@pytest.mark.parametrize(
    ("gpu", "changes", "expected"),
    [
        (300, {}, Sharing(True, False)),
        (180, {}, Sharing(False, True)),  # sharing would leave a fraction of the cache
        (180, {"engine": {"share_weights": True}}, Sharing(True, False)),
        (300, {"engine": {"share_weights": False}}, Sharing(False, True)),
        (300, {"trainer": {"pipeline_depth": 1}}, Sharing(False, False)),
        (300, {"lora": {"rank": 8}}, Sharing(False, True)),
    ],
    ids=str,
)
def test_how_learner_and_vllm_share_a_gpu(gpu, changes, expected):
    feature = {"kind": "word", "word": "tea"}
    run = parse_config({"model": "m", "run_dir": "r", "target": [{"kind": "pointwise", "feature": feature}], **changes})
    model = {name: value for name, value in LARGE.items() if name not in ("shared_weights", "sleeps", "device_bytes")}
    sharing, memory = plan_on_gpu(run, config=LLAMA_8B, device_bytes=gpu * GIB, **model)
    assert sharing == expected
    assert memory == large(device_bytes=gpu * GIB, shared_weights=sharing.share_weights, sleeps=sharing.sleeps)
    with pytest.raises(UserError, match="too few"):
        plan_on_gpu(run, config=LLAMA_8B, device_bytes=100 * GIB, **model)


def test_the_cache_on_a_cpu_takes_a_quarter_at_most():
    planned = plan_cpu_cache(
        SMOLLM2, dtype=torch.float32, memory_bytes=GIB, max_length=200, max_sequences=10_000
    )  # 45 blocks of 128 · 46,080 bytes, two a sequence, one kept by vLLM
    assert planned == plan.MemoryPlan(GIB, kv_cache=265_420_800, tokens_cached=5_632, sequences=22)
    assert planned.describe() == "key-value cache 0.247: 5,632 tokens, 22 sequences of full length side by side"
    few = plan_cpu_cache(SMOLLM2, dtype=torch.float32, memory_bytes=GIB, max_length=200, max_sequences=3)
    assert (few.kv_cache, few.sequences) == (7 * 128 * 46_080, 3)
    with pytest.raises(UserError, match="8,192 tokens take 0.357 GiB, and a quarter of this machine's memory is 0.25"):
        plan_cpu_cache(SMOLLM2, dtype=torch.float32, memory_bytes=GIB, max_length=8192, max_sequences=3)


def test_vllm_makes_of_the_planned_bytes_the_planned_blocks(tmp_path):
    folder = save_model(tmp_path / "model")
    policy = load_model(str(folder), "float32", "cpu", trust_remote_code=False)
    planned = plan_cpu_cache(
        policy.model.config, dtype=torch.float32, memory_bytes=8_000_000, max_length=200, max_sequences=1000
    )

    def start(kv_cache_bytes):
        return VLLMEngine(
            policy,
            str(folder),
            EOS,
            max_new_tokens=8,
            max_length=200,
            max_sequences=32,
            kv_cache_bytes=kv_cache_bytes,
            share_weights=False,
            sleeps=False,
            beside_learner=False,
            trust_remote_code=False,
            say=lambda line: None,
        )

    least = 3 * 128 * kv_bytes_per_token(policy.model.config, torch.float32)  # two blocks, and the one that it keeps
    for kv_cache, blocks in ((planned.kv_cache, planned.tokens_cached // 128 + 1), (least, 3)):
        engine = start(kv_cache)
        try:
            assert engine._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == blocks
        finally:
            engine.close()
    with pytest.raises(UserError, match="KV cache is needed"):
        start(least - 1)


class _Dense(Storages):
    """Sparse gradients of the embedding have a row a token, and no storage of their own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self._watch(x.untyped_storage())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "inner", "heads", "kv_heads", "head_dim", "tied", "lora_rank"),
    [
        (LlamaConfig, 512, 6, 2, 32, True, 0),
        (LlamaConfig, 672, 6, 1, 32, False, 0),
        (Qwen2Config, 1024, 6, 1, 32, True, 0),
        (Qwen3Config, 576, 6, 3, 64, True, 0),
        (LlamaConfig, 512, 6, 2, 32, True, 8),
        (Qwen3Config, 576, 6, 3, 64, False, 8),
    ],
)
def test_the_learner_holds_what_is_planned_for_it(kind, inner, heads, kv_heads, head_dim, tied, lora_rank, dtype):
    """Gradients and activations at their peak, to the byte, beside the plan; and what the optimizer keeps."""
    torch.manual_seed(0)
    prompt, length, count = 16, 48, 16
    config = kind(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    policy = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=dtype))
    if lora_rank:
        policy = LoRAPolicy(policy, LoRAConfig(rank=lora_rank), seed=0)
    micro_batch_tokens = prompt + count * length
    learner = Learner(
        policy,
        divergences.get("jensen_shannon"),
        loss=LossConfig(),
        optimizer=OptimizerConfig(),
        rounds=2,
        micro_batch_tokens=micro_batch_tokens,
    )
    rollouts = Rollouts(
        contexts=(Context(0, "", tuple(range(prompt))),),
        context_index=torch.zeros(count, dtype=torch.long),
        token_ids=torch.randint(1024, (count * length,)),
        cu_seqlens=torch.arange(0, count * length + 1, length).int(),
        behavior_logprob=torch.zeros(count * length),
        finished=torch.ones(count, dtype=torch.bool),
    )
    rollouts = replace(rollouts, behavior_logprob=policy.token_logprobs(rollouts, micro_batch_tokens))
    log_score = rollouts.behavior_logprob.view(count, length).sum(1).double() + torch.randn(count).double()

    def step():
        zeros = torch.zeros(count, dtype=torch.float64)
        return learner.update(*learner.backward(rollouts, log_score, zeros, zeros), 0)

    assert not step().skipped
    state = [tensor for moments in learner.optimizer.state.values() for tensor in moments.values()]
    with _Dense(*policy.model.parameters(), *learner.masters, *state) as seen:
        step()

    planned = plan_memory(
        config,
        num_parameters=sum(p.numel() for p in policy.model.parameters()),
        num_adapter=sum(p.numel() for p in policy.model.parameters() if p.requires_grad) if lora_rank else 0,
        dtype=dtype,
        device_bytes=10 * GIB,
        max_length=prompt + length,
        micro_batch_tokens=micro_batch_tokens,
        max_sequences=0,
        shared_weights=False,
        sleeps=False,
    )
    kept = sum(tensor.numel() * tensor.element_size() for tensor in [*state, *learner.masters])
    assert planned.optimizer <= kept <= planned.optimizer + 100 * len(state)  # a step count beside each pair of moments
    head = 1024 * 192
    expected = planned.gradients + planned.activations
    if dtype == torch.bfloat16:  # chunked PyTorch, in place of Triton: another block, and the head in float32
        expected += head * 4 + 1024 * 1024 * 4 - min(plan.LOSS_ROWS * 1024 * 2, plan.LOSS_BYTES)
    else:  # a vocabulary this small fills no whole block
        expected += 1024 * 1024 * 4 - plan.CHUNKED_LOSS_BYTES
    assert 0.7 * expected < seen.peak() <= expected


def test_a_model_on_the_meta_device_has_the_parameters_of_the_real_one(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in real.parameters())


def test_the_page_shows_the_tables_of_today():
    page = memory_table.PAGE.read_text(encoding="utf-8")
    shown = page.partition(memory_table.BEGIN)[2].partition(memory_table.END)[0].strip()
    assert shown == memory_table.tables().strip(), "stale: python -m benchmarks.memory_table --write"
