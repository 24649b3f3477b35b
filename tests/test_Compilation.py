"""A compiled training gives what an uncompiled one gives, also if it is killed and resumed."""

import pytest
import torch
from test_ClassifierNetwork import X, equal_weights, noise, small_model, y

import ClassifierTraining
from ClassifierTraining import Recipe, train_classifier
from Compilation import CompiledNetwork, backend_for

CPU = torch.device("cpu")
RECIPE = Recipe(steps=6, batch_size=20, micro_batch_size=8, learning_rate=0.01, muon_learning_rate=1e-3, scales=(0.5, 1.25))  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch):
    """Train as on a GPU: in one pass, compiled, but by a backend that a CPU has."""
    monkeypatch.setattr(ClassifierTraining, "in_one_pass", lambda device: True)
    monkeypatch.setattr("Precision.half_precision", lambda device: None)
    monkeypatch.setenv("COMPILE_BACKEND", "aot_eager")


def train(model, **options):
    return train_classifier(model, X, y, RECIPE, seed=0, **options)


def killed_and_resumed(device):
    class Killed(Exception):
        pass

    def kill(model, record):
        if record["epoch"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train(small_model(device=device), after_epoch=kill, checkpoint="run.pt")
    resumed = small_model(seed=9, device=device)
    train(resumed, checkpoint="run.pt")
    return resumed


def test_networks_are_compiled_on_cuda_and_where_the_environment_says_so(monkeypatch):
    monkeypatch.delenv("COMPILE_BACKEND", raising=False)
    assert backend_for(torch.device("cuda")) == "cudagraphs"
    assert backend_for(CPU) is None and CompiledNetwork(small_model(device="cpu"), CPU).compiled is None
    monkeypatch.setenv("COMPILE_BACKEND", "inductor")
    assert backend_for(torch.device("cuda")) == backend_for(CPU) == "inductor"
    monkeypatch.setenv("COMPILE_BACKEND", "none")
    assert backend_for(torch.device("cuda")) is None


def test_a_compiled_training_is_an_uncompiled_one_and_can_be_killed_and_resumed(compiled, monkeypatch):
    whole = small_model(device="cpu")
    history = train(whole)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"

    assert equal_weights(killed_and_resumed("cpu"), whole)

    monkeypatch.setenv("COMPILE_BACKEND", "none")
    plain = small_model(device="cpu")
    plain_history = train(plain)
    for key in ("train_loss", "train_accuracy"):
        assert [e[key] for e in history] == pytest.approx([e[key] for e in plain_history], rel=1e-2), key
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=2e-2, atol=2e-3, msg=name)


def test_a_training_compiled_as_on_this_device_can_be_killed_and_resumed(device, monkeypatch, capsys):
    monkeypatch.delenv("COMPILE_BACKEND")
    whole = small_model(device=device)
    train(whole)
    assert "not compiled" not in capsys.readouterr().out
    assert equal_weights(killed_and_resumed(device), whole)


def test_each_size_of_the_images_is_one_graph(compiled):
    graphs = []
    torch._dynamo.register_backend(lambda graph, inputs: graphs.append(graph) or graph, name="counted")
    network = CompiledNetwork(small_model(device="cpu").train(), CPU)
    network.compiled = torch.compile(network.model, backend="counted", dynamic=False, fullgraph=True)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    for size in (16, 24, 16, 24, 16):
        network.prepare(torch.rand(4, 3, size, size))
    assert len(graphs) == 2
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name]), "trials leave no trace"


def test_a_training_compiles_each_size_once(compiled):
    """What is compiled in a trial is what the training uses."""
    train_classifier(small_model(device="cpu"), noise(20, 24), y, RECIPE, seed=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of 16 and 24 pixels


@pytest.mark.parametrize("fails", ["when it compiles", "in the backward pass", "unknown backend"])
def test_what_cannot_be_compiled_is_said_once_and_trained_as_it_is(compiled, monkeypatch, capsys, fails):
    def broken(graph, inputs):
        if fails == "when it compiles":
            raise NotImplementedError("no such operator\nand more")

        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise NotImplementedError("no such operator\nand more")

        return lambda *arguments: [Broken.apply(output) for output in graph(*arguments)]

    if fails == "unknown backend":
        monkeypatch.setenv("COMPILE_BACKEND", "nonsense")
    else:
        torch._dynamo.register_backend(broken, name=f"fails {fails}")
        monkeypatch.setenv("COMPILE_BACKEND", f"fails {fails}")
    model = small_model(device="cpu")
    train(model)
    said = capsys.readouterr().out
    assert said.count("The network is not compiled with") == 1 and said.count("\n") == 1
    monkeypatch.setenv("COMPILE_BACKEND", "none")
    plain = small_model(device="cpu")
    train(plain)
    assert equal_weights(model, plain)
