"""Measures speeds, as ratios within one run; prints Markdown tables.

    python tests/benchmarks/measure_speed.py attention     # linear against softmax attention, by tokens
    python tests/benchmarks/measure_speed.py presets       # all presets, eager and compiled
    python tests/benchmarks/measure_speed.py peak          # `base` against matrix products, and int8
    python tests/benchmarks/measure_speed.py sizes         # `small` by the size of its images
    python tests/benchmarks/measure_speed.py baselines     # `small`, now and before, and two baselines
    python tests/benchmarks/measure_speed.py optimizer     # Muon, ours against PyTorch's
    python tests/benchmarks/measure_speed.py sampling      # the bundled model by kind of guidance
    python tests/benchmarks/measure_speed.py start         # from the start of the process to the first image

Run it while nothing else runs.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from compare_recipes import FLAT, FLAT_BASE
from diffusers.models.modeling_utils import ModelMixin
from train_baseline import DiTBaseline, UNetBaseline, forward_flops

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline, PetTransformer2DModel
from pet_pipeline.evaluation.images import GeneratedImages, generate_images
from pet_pipeline.training.optimization import BatchedMuon, block_matrices
from pet_pipeline.transformer_pet import PetAttention, grid_to_tokens, tokens_to_grid


def best_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of some calls, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


class SoftmaxAttention(PetAttention):
    """The same layer with scaled dot-product attention, whose queries are normalised too."""

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, perturbed: bool = False
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        query, key = (F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        grid = tokens_to_grid(value.transpose(1, 2).flatten(2), height, width)
        return self.to_out[0](attended + grid_to_tokens(self.conv_v(grid)))


ATTENTION = {"linear": PetAttention, "softmax": SoftmaxAttention}


def attention_seconds(kind: str, tokens: int) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward, of one attention layer of the preset `small`."""
    torch.manual_seed(0)
    batch, side = max(1, 4096 // tokens), int(tokens**0.5)
    layer = ATTENTION[kind](192, 3)
    hidden_states = torch.randn(batch, tokens, 192, requires_grad=True)

    @torch.no_grad()
    def forward() -> None:
        layer(hidden_states, side, side)

    def backward() -> None:
        layer(hidden_states, side, side).sum().backward()

    return best_seconds(forward), best_seconds(backward)


def peak_memory(kind: str, tokens: int) -> float:
    """MiB that forward and backward add to the memory of a process of their own, at their peak; on Linux."""
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from measure_speed import attention_seconds, memory\n"
        "attention_seconds('linear', 64)\n"
        "ctypes.CDLL(None).malloc_trim(0)\n"  # what this first run no longer needs
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak begins anew
        "before = memory('VmRSS')\n"
        f"attention_seconds({kind!r}, {tokens})\n"
        "print(memory('VmHWM') - before)\n"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def memory(name: str) -> float:
    """Memory of this process in MiB, by its name in `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"This system does not know {name}.")


def measure_attention() -> None:
    print("| tokens | batch | forward, softmax / linear | forward + backward | linear, MiB | softmax, MiB |")
    print("|---" * 6 + "|")
    for tokens in (64, 256, 1024, 4096):
        linear, softmax = attention_seconds("linear", tokens), attention_seconds("softmax", tokens)
        memory = [peak_memory(kind, tokens) for kind in ("linear", "softmax")]
        ratios = f"{softmax[0] / linear[0]:.2f} | {softmax[1] / linear[1]:.2f}"
        batch = max(1, 4096 // tokens)
        print(f"| {tokens:,} | {batch} | {ratios} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True)


def measure_presets() -> None:
    print("| preset | parameters | GFLOP | mode | training step, images/s | forward, images/s |")
    print("|---" * 6 + "|")
    for preset, batch in (("tiny", 64), ("small", 64), ("base", 16)):
        for compiled in (False, True):
            torch.manual_seed(0)
            model = PetTransformer2DModel.from_preset(preset)
            size = f"{model.num_parameters() / 1e6:.2f} M | {forward_flops(model) / 1e9:.2f}"
            if compiled:
                model.compile()
            images, timesteps = torch.randn(batch, 3, 32, 32), torch.zeros(batch)
            labels = torch.zeros(batch, dtype=torch.long)

            def backward(model=model, inputs=(images, timesteps, labels)) -> None:
                model(*inputs, return_dict=False)[0].square().mean().backward()

            @torch.no_grad()
            def forward(model=model, inputs=(images, timesteps, labels)) -> None:
                model(*inputs, return_dict=False)

            step, sample = best_seconds(backward), best_seconds(forward)
            mode = "compiled" if compiled else "eager"
            print(f"| `{preset}` | {size} | {mode} | {batch / step:.1f} | {batch / sample:.1f} |", flush=True)


def in_turn(functions: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Seconds of the fastest call of each function, where they take turns: the machine's speed varies.

    In each turn, a first call that is not measured brings weights and memory back.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: min(found) for name, found in times.items()}


def onnx_runner(
    model: ModelMixin, inputs: tuple[torch.Tensor, ...], folder: str, eight_bits: bool
) -> Callable[[], object]:
    """A forward pass in ONNX Runtime, in float32 or with weights and activations of 8 bits."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    path, names = f"{folder}/model.onnx", ("hidden_states", "timestep", "class_labels")
    torch.onnx.export(model, inputs, path, input_names=names, dynamo=True, verbose=False)
    if eight_bits:
        quantize_dynamic(path, f"{folder}/quantized.onnx")
        path = f"{folder}/quantized.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs)}
    return lambda: session.run(None, feed)


def measure_peak() -> None:
    batch = 16
    inputs = torch.randn(batch, 3, 32, 32), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)

    def passes(model: ModelMixin) -> tuple[Callable[[], object], Callable[[], object]]:
        def step() -> None:
            model(*inputs, return_dict=False)[0].square().mean().backward()

        @torch.no_grad()
        def forward() -> None:
            model(*inputs, return_dict=False)

        return forward, step

    torch.manual_seed(0)
    model = PetTransformer2DModel.from_preset("base")
    former = PetTransformer2DModel.from_preset("base", **json.loads(FLAT_BASE))
    compiled = copy.deepcopy(model)
    compiled.compile()
    functions: dict[str, Callable[[], object]] = {}
    flops = {}
    for name, each in (("`base`", model), ("the former `base`", former), ("`base`, compiled", compiled)):
        one_pass = forward_flops(former if each is former else model)
        for what, function in zip(("forward", "training step"), passes(each)):
            functions[f"{name} | {what}"] = function
            flops[f"{name} | {what}"] = batch * one_pass * (1 if what == "forward" else 3)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    functions["matrix product"], flops["matrix product"] = lambda: a @ b, 2 * 2048**3
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float32", "int8"):
            name = f"`base`, ONNX Runtime, {kind} | forward"
            functions[name] = onnx_runner(model.eval(), inputs, folder, kind == "int8")
            flops[name] = flops["`base` | forward"]
        for function in functions.values():  # compiles what is compiled
            function()
        seconds = in_turn(functions)
    peak = flops.pop("matrix product") / seconds.pop("matrix product")
    print(f"The product of two matrices of 2048×2048 runs at {peak / 1e9:.0f} GFLOP/s.\n")
    print("| model | pass | images/s | share of that speed |\n" + "|---" * 4 + "|")
    for name, time_taken in seconds.items():
        print(f"| {name} | {batch / time_taken:.1f} | {flops[name] / time_taken / peak:.2f} |")
    with torch.profiler.profile() as profile:
        for _ in range(5):
            functions["`base` | forward"]()
    print("\n| operation of a forward pass of `base` | share of the time |\n|---|---|")
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:12]:
        print(f"| `{event.key}` | {event.self_cpu_time_total / total:.3f} |")


def measure_sizes() -> None:
    print("| pixels | batch | training step, images/s | cost of an image |\n|---|---|---|---|")
    rates = {}
    for size, batch in ((32, 64), (64, 16), (128, 4)):
        model = PetTransformer2DModel.from_preset("small", sample_size=size)
        inputs = torch.randn(batch, 3, size, size), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)

        def backward(model=model, inputs=inputs) -> None:
            model(*inputs, return_dict=False)[0].square().mean().backward()

        rates[size] = batch / best_seconds(backward)
        cost = rates[32] / rates[size]
        print(f"| {size}×{size} | {batch} | {rates[size]:.1f} | {cost:.2f} |", flush=True)


def measure_baselines() -> None:
    images = torch.randn(64, 3, 32, 32), torch.zeros(64), torch.zeros(64, dtype=torch.long)
    print("| model | parameters | GFLOP | training step, images/s | evaluations | seconds per image |")
    print("|---" * 6 + "|")
    # Preconditioned by frequency, as by default; with these variances it changes nothing.
    small = PetTransformer2DModel.from_preset("small", frequency_variances=[0.25] * 12)
    flat = PetTransformer2DModel(**json.loads(FLAT), frequency_variances=[0.25] * 48)
    for name, model in (
        ("`small`", small),
        ("the former `small`", flat),
        ("DiT", DiTBaseline()),
        ("UNet", UNetBaseline()),
    ):

        def backward(model: ModelMixin = model) -> None:
            model(*images, return_dict=False)[0].square().mean().backward()

        rate = 64 / best_seconds(backward)
        pipeline = PetDiffusionPipeline(model.eval(), AdaptiveEDMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        runs = [generate_images(pipeline, 64, guidance_scale=1.0) for _ in range(3)]
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        cells = f"{size:.2f} M | {forward_flops(model) / 1e9:.2f} | {rate:.1f} | {runs[0].evaluations:.0f}"
        print(f"| {name} | {cells} | {min(run.seconds for run in runs):.3f} |", flush=True)


def measure_optimizer() -> None:
    print("| preset | `torch.optim.Muon`, ms a step | `BatchedMuon` | ratio |\n|---|---|---|---|")
    for preset in ("small", "base"):
        model = PetTransformer2DModel.from_preset(preset)
        matrices = block_matrices(model)
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        theirs, ours = (
            1000 * best_seconds(optimizer(matrices, lr=0.0).step)
            for optimizer in (torch.optim.Muon, BatchedMuon)
        )
        print(f"| `{preset}` | {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f} |", flush=True)


def measure_sampling() -> None:
    pipeline = PetDiffusionPipeline.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    without_guide = {"guidance_scale": 2.5, "autoguidance_scale": 1.0}
    kinds: dict[str, dict[str, float]] = {
        "none": {"guidance_scale": 1.0, "autoguidance_scale": 1.0},
        "classifier-free": without_guide,
        "classifier-free and perturbed attention of 0.5": without_guide | {"pag_scale": 0.5},
        "the default, with the guide": {},
    }
    runs: dict[str, list[GeneratedImages]] = {kind: [] for kind in kinds}
    for _ in range(3):  # in turn, because the speed of the machine varies
        for kind, settings in kinds.items():
            runs[kind].append(generate_images(pipeline, 16, **settings))
    print("| guidance | seconds for 16 images, fastest of 3 | evaluations of the denoiser | ratio |")
    print("|---" * 4 + "|")
    fastest = {kind: 16 * min(run.seconds for run in found) for kind, found in runs.items()}
    for kind, seconds in fastest.items():
        ratio = seconds / fastest["classifier-free and perturbed attention of 0.5"]
        print(f"| {kind} | {seconds:.1f} | {runs[kind][0].evaluations:.0f} | {ratio:.2f} |")


def measure_start() -> None:
    print("| from the start of a process | seconds |\n|---|---|")
    load = "from pet_pipeline import PetDiffusionPipeline\n"
    steps = {
        "`import pet_pipeline`": "import pet_pipeline",
        "PyTorch alone": "import torch",
        "the pipeline's imports": load,
        "the bundled model loaded": load + "PetDiffusionPipeline.from_pretrained()",
        "one image": load + "PetDiffusionPipeline.from_pretrained()('cat')",
    }
    for name, code in steps.items():

        def run(code: str = code) -> None:
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

        print(f"| {name} | {best_seconds(run, 3):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measurements = {
        "attention": measure_attention,
        "presets": measure_presets,
        "peak": measure_peak,
        "sizes": measure_sizes,
        "baselines": measure_baselines,
        "optimizer": measure_optimizer,
        "sampling": measure_sampling,
        "start": measure_start,
    }
    parser.add_argument("what", choices=list(measurements))
    measurements[parser.parse_args().what]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
