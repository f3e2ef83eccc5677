"""PyTorch's side of `bench learn`: the same step of gate learning, timed on request.

    python3 learn-peer.py PATH/TO/MODEL.gguf SEQUENCES TOKENS THREADS

Loads the model in fp32 and in bf16, prints {"ready": true, ...}; then answers every line "fp32" or "bf16" on
stdin by one line {"ms": milliseconds, "loss": loss} for one step: forward, next-token loss, backward to the 2L gates, weights
frozen. Needs torch, transformers, accelerate and gguf; the product needs none of them.
"""
import json
import os
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

path, sequences, tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(threads)
folder, file = os.path.split(path)
gates = None


def gated(self, hidden_states, **kwargs):
    i = self.self_attn.layer_idx
    h = hidden_states
    h = h + gates[2 * i] * self.self_attn(hidden_states=self.input_layernorm(h), **kwargs)[0]
    return h + gates[2 * i + 1] * self.mlp(self.post_attention_layernorm(h))


def load(dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    type(model.model.layers[0]).forward = gated
    return model


models = {"fp32": load(torch.float32), "bf16": load(torch.bfloat16)}
count = 2 * models["fp32"].config.num_hidden_layers
# The same ids as in learn-bench.ts.
ids = torch.tensor([100 + (i * 7919) % 40000 for i in range(sequences * tokens)]).view(sequences, tokens)


def step(model):
    global gates
    gates = torch.ones(count, dtype=model.dtype, requires_grad=True)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


print(json.dumps({"ready": True, "torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    loss = step(models[line.strip()])
    print(json.dumps({"ms": 1000 * (time.perf_counter() - start), "loss": loss}), flush=True)
