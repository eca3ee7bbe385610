"""A Llama of raylm's in llama.cpp's own number formats: size, speed and quality, as points beside a search's front.

    python tests/benchmarks/llamacpp_points.py MODEL DATA OUTPUT.json [--formats F32,Q8_0,Q5_1,Q4_1,Q4_0]

MODEL is a model directory, DATA a prepared set with its tokens. Needs the packages xllamacpp and gguf. The embedding
and the output matrix have 8 bits where the others have fewer. Quality is bits per byte of the first windows of the
validation text, token by token through llama.cpp's server; one window is checked against transformers in fp32. Its
share of the first format's goes into the plots of ``raylm report RUN --beside OUTPUT.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from raylm.data.tokens.shards import TokenShards

WINDOW = 128
NEW_TOKENS = 64
PROMPT_TOKENS = 32
# Parts of a block -> names there and here, without the ends.
TENSORS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_gguf(model: LlamaForCausalLM, directory: Path, path: Path, form: str) -> None:
    """The model as a file of llama.cpp, its matrices in ``form``."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    write_tokenizer(writer, json.loads((directory / "tokenizer.json").read_text()), config)
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    wide = "Q8_0" if form != "F32" else form
    add(writer, "token_embd.weight", state["model.embed_tokens.weight"], wide)
    add(writer, "output.weight", state["lm_head.weight"], wide)
    add(writer, "output_norm.weight", state["model.norm.weight"], "F32")
    for number in range(config.num_hidden_layers):
        for there, here in TENSORS.items():
            values = state[f"model.layers.{number}.{here}.weight"]
            if there in ("attn_q", "attn_k"):
                values = interleaved(values, size)
            add(writer, f"blk.{number}.{there}.weight", values, "F32" if values.ndim == 1 else form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, values: dict[str, Any], config: Any) -> None:
    """A byte-level BPE tokenizer; ids go in and come out, but llama.cpp loads no model without one."""
    special = {token["id"] for token in values["added_tokens"]}
    tokens = [token for token, _ in sorted(values["model"]["vocab"].items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_add_bos_token(False)


def interleaved(values: np.ndarray, size: int) -> np.ndarray:
    """Rows of queries or keys, [heads * size, width], as llama.cpp turns them: pairs side by side instead of halves."""
    return values.reshape(-1, 2, size // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, form: str) -> None:
    kind = gguf.GGMLQuantizationType[form]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


class Server:
    """llama.cpp on a file, with one slot."""

    def __init__(self, path: Path, threads: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.hostnames, parameters.port = ["127.0.0.1"], 0
        parameters.n_parallel, parameters.n_ctx = 1, 512
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.n_gpu_layers, parameters.verbosity = 0, 0
        self._server = xllamacpp.Server(parameters)

    def complete(self, **body: Any) -> dict[str, Any]:
        url, header = f"{self._server.listening_address}/completion", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), header)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def losses(self, window: list[int], vocabulary: int) -> list[float]:
        """Nats of each token of a window but the first."""
        found = []
        for place in range(1, len(window)):
            answer = self.complete(
                prompt=window[:place], n_predict=1, n_probs=vocabulary, temperature=1.0, cache_prompt=True,
                samplers=["temperature"], ignore_eos=True,
            )  # fmt: skip
            choices = {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}
            found.append(-choices[window[place]])
        return found

    def speed(self, prompt: list[int]) -> float:
        """New tokens a second of one answer."""
        answer = self.complete(
            prompt=prompt, n_predict=NEW_TOKENS, temperature=0.0, ignore_eos=True, cache_prompt=False
        )
        return answer["timings"]["predicted_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--formats", default="F32,Q8_0,Q5_1,Q4_1,Q4_0")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    shards = TokenShards(given.data, "validation")
    stream = shards.read(0, given.tokens).astype(np.int64).tolist()
    windows = [stream[i : i + WINDOW] for i in range(0, len(stream) - WINDOW + 1, WINDOW)]
    tokens_per_byte = shards.token_count / shards.byte_count
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(windows[:1])).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(windows[0][1:])).item()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for form in given.formats.split(","):
            path = Path(folder) / f"{form}.gguf"
            write_gguf(model, given.model, path, form)
            server = Server(path, given.threads)
            nats = [server.losses(window, model.config.vocab_size) for window in windows]
            if form == "F32":
                difference = abs(np.mean(nats[0]) - expected)
                assert difference < 0.01, f"llama.cpp's loss differs by {difference} from transformers'"
            mean = float(np.mean([loss for window in nats for loss in window]))
            rates = [server.speed(window[:PROMPT_TOKENS]) for window in windows[:5]]
            found.append(
                {
                    "name": f"llama.cpp {form}", "megabytes": path.stat().st_size / 1e6, "nats": mean,
                    "quality_ratio": mean / (found[0]["nats"] if found else mean),
                    "bits_per_byte": mean / math.log(2) * tokens_per_byte,
                    "p50_milliseconds": 1e3 / float(np.median(rates)),
                }
            )  # fmt: skip
            print(found[-1], flush=True)
            given.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
