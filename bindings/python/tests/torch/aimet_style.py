# SPDX-License-Identifier: Apache-2.0
# A script as users of AIMET write them; test_scripts.py runs it with its imports changed, too.
"""Post-training quantization, then quantization-aware training, of a small network."""

import sys

import torch
from torch import nn

from halfstep.torch import (
    QuantizationSimModel,
    equalize_model,
    fold_all_batch_norms,
    reestimate_bn_stats,
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(16 * 7 * 7, 4)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(x, 1))


def pictures(count, seed):
    """Stripes in four directions, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    fields = torch.stack([rows, columns, rows + columns, rows - columns])
    stripes = torch.sin(fields / 2)[labels][:, None]
    return stripes + 1.2 * torch.randn(count, 1, 28, 28, generator=generator), labels


def train(model, data, epochs, lr):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for x, y in zip(data[0].split(32), data[1].split(32), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def evaluate(model, data):
    model.eval()
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main(folder):
    torch.manual_seed(0)
    training, test = pictures(768, 1), pictures(512, 2)
    dummy_input = torch.randn(1, 1, 28, 28)
    model = Network()
    train(model, training, epochs=3, lr=0.02)
    print("fp32", evaluate(model, test))

    # Re-estimated statistics fit the weights at the end of training.
    loader = [(x, None) for x in training[0].split(64)]
    reestimate_bn_stats(model, loader, num_batches=8, forward_fn=lambda m, b: m(b[0]))

    # Post-training quantization.
    model.eval()
    fold_all_batch_norms(model, input_shapes=(1, 1, 28, 28), dummy_input=dummy_input)
    equalize_model(model, input_shapes=(1, 1, 28, 28), dummy_input=dummy_input)
    sim = QuantizationSimModel(
        model,
        dummy_input=dummy_input,
        quant_scheme="tf_enhanced",
        default_param_bw=4,
        default_output_bw=8,
    )

    def forward_pass_callback(model, args=None):
        model.eval()
        with torch.no_grad():
            for x in training[0][:256].split(32):
                model(x)

    sim.compute_encodings(forward_pass_callback, None)
    print("ptq", evaluate(sim.model, test))

    # Quantization-aware training.
    train(sim.model, training, epochs=1, lr=0.002)
    print("qat", evaluate(sim.model, test))
    sim.export(path=folder, filename_prefix="network", dummy_input=dummy_input)


if __name__ == "__main__":
    main(sys.argv[1])
