"""What generation servers hold, and how long they take for a batch of sequences."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.planning.devices import Assumptions, Device
from megatron_trd.planning.flops import generation
from megatron_trd.planning.model_shape import ModelShape, layer_parameters, num_parameters

GIB = 2**30
_DRAIN_STEPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGroup:
    """Equal servers of one model in bf16."""

    shape: ModelShape
    gpus: int
    tp: int
    device: Device
    assumptions: Assumptions

    @property
    def replicas(self) -> int:
        """Servers."""
        return self.gpus // self.tp

    @property
    def weight_bytes(self) -> int:
        """Of one GPU."""
        return num_parameters(self.shape) * 2 // self.tp

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, on one GPU; ranks beyond the groups repeat one."""
        heads = max(self.shape.num_kv_heads / self.tp, 1)
        return round(2 * heads * self.shape.head_dim * self.shape.num_layers * 2)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values fit on one server; 0 = not even the weights do."""
        free = self.device.memory_gib * GIB * self.assumptions.server_memory_fraction - self.weight_bytes
        return max(0, int(free // self.kv_bytes_per_token))

    def step_seconds(self, batch: float, context: float) -> tuple[float, str]:
        """Return the time of one token for each of `batch` sequences on one server, and what limits it."""
        device, assumed = self.device, self.assumptions
        read = (self._read_bytes(batch) + batch * context * self.kv_bytes_per_token) / (device.memory_tb_s * 1e12)
        work = generation(self.shape, tokens=batch, mean_context=context).total
        work += 2 * batch * self.shape.vocab_size * self.shape.hidden_size
        compute = work / (self.tp * device.bf16_tflops * 1e12 * assumed.prefill_efficiency)
        memory = read / assumed.decode_efficiency
        limit = "memory bandwidth" if memory >= compute else "compute"
        return max(memory, compute) + assumed.decode_overhead_ms / 1e3, limit

    def prefill_seconds(self, sequences: float, length: float) -> float:
        """Return the time to read all prompts, spread over the servers."""
        work = generation(self.shape, tokens=sequences * length, mean_context=length / 2).total
        peak = self.replicas * self.tp * self.device.bf16_tflops * 1e12
        return work / (peak * self.assumptions.prefill_efficiency)

    def decode_seconds(self, sequences: float, *, prompt: float, mean: float, longest: float, at_most: int) -> float:
        """Return the time to write all responses.

        Servers stay full while there are sequences that wait; then the batch drains. Lengths are taken to be spread
        so that a share (1 - s / longest)^k of the sequences is longer than s, k = longest / mean - 1.
        """
        each = sequences / self.replicas
        room = self.cached_tokens / (prompt + mean)
        batch = max(1.0, min(each, room, at_most / self.replicas))
        context = prompt + mean / 2
        seconds = max(0.0, each - batch) * mean / batch * self.step_seconds(batch, context)[0]
        k, width = longest / mean - 1, longest / _DRAIN_STEPS
        for index in range(_DRAIN_STEPS):
            start = (index + 0.5) * width
            left = batch * (1 - start / longest) ** k
            if left >= 0.5:  # nobody is that long
                seconds += width * self.step_seconds(max(left, 1.0), prompt + start)[0]
        return seconds

    def _read_bytes(self, batch: float) -> float:
        """Weights that a step reads on one GPU: of experts those that some token is sent to."""
        experts, shape = self.shape.experts, self.shape
        if experts is None:
            return self.weight_bytes
        counts = [layer_parameters(shape, layer) for layer in range(shape.num_layers)]
        unused = (1 - experts.top_k / experts.num_experts) ** batch
        return self.weight_bytes - unused * sum(count.expert for count in counts) * 2 / self.tp
