"""§12 as claims: what the tangent features of a network say, held against numbers made without them (docs, G1–G3)."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from linfit import Filter, GradientDescent, GradientFlow, Prediction, Ridge, predict
from linfit.tangent import kernel, krylov, leave_one_out
from sims.claims import Normal, Sides, existence, identity, inequality, statistical
from sims.parameters import PENALTY, TAU, TIME, Parameter

INPUTS, HIDDEN, OUTPUTS, SAMPLES = 3, 5, 2, 6

NETWORK = {
    "gain": Parameter(low=0.3, high=2.0, scale="log"),  # size of the pretrained weights
    "weighted": Parameter(low=0, high=1, scale="whole"),
    "tau": TAU.within(-0.5, 1.5),
}
"""A network, and whether its samples have weights."""


def _apply(weights: Any, x: Any) -> Any:
    return jnp.tanh(x @ weights["in"] + weights["bias"]) @ weights["out"]


class _Instance:
    """A random network, three data sets, and its Jacobian by central differences, in plain numpy."""

    def __init__(self, normal: Normal, gain: float, weighted: int):
        self.shapes = {"in": (INPUTS, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, OUTPUTS)}
        self.weights = {name: gain * normal(*shape) for name, shape in self.shapes.items()}
        self.x, self.y = normal(3, SAMPLES, INPUTS), normal(3, SAMPLES, OUTPUTS)
        self.sample_weights = np.exp(0.5 * normal(SAMPLES)) if weighted else np.ones(SAMPLES)
        theta = np.concatenate([self.weights[name].ravel() for name in self.shapes])
        step = 1e-4
        sides = [[self.f(theta + sign * h) for sign in (-2, -1, 1, 2)] for h in step * np.eye(len(theta))]
        # Fourth order: (f(−2h) − 8f(−h) + 8f(h) − f(2h)) / 12h.
        self.J = np.stack([(a - 8 * b + 8 * c - d) / (12 * step) for a, b, c, d in sides], axis=-1)
        self.outputs = self.f(theta)

    def f(self, theta: np.ndarray) -> np.ndarray:
        """f of all samples, (3, n·k)."""
        ends = np.cumsum([np.prod(shape) for shape in self.shapes.values()])[:-1].astype(int)
        first, bias, last = (part.reshape(s) for part, s in zip(np.split(theta, ends), self.shapes.values()))
        return (np.tanh(self.x @ first + bias) @ last).reshape(3, -1)

    def predict(self, **options: Any) -> Prediction:
        pairs = list(zip(self.x, self.y))
        return predict(_apply, self.weights, *pairs, sample_weights=self.sample_weights, **options)

    def fitted(self, penalty: float, kept: np.ndarray | None = None) -> np.ndarray:
        """δ of ridge by the normal equations in the weights of the network, nλ held fixed."""
        w = np.repeat(self.sample_weights if kept is None else self.sample_weights * kept, OUTPUTS)
        J, residual = self.J[0], self.y[0].ravel() - self.outputs[0]
        return np.linalg.solve(J.T @ (w[:, None] * J) + SAMPLES * penalty * np.eye(J.shape[1]), J.T @ (w * residual))


def _everywhere(prediction: Prediction, filter: Filter, tau: float) -> np.ndarray:
    """Predicted outputs on training, test and other samples (3, n·k)."""
    domains: tuple[Any, ...] = ("train", "test", "other")
    return np.stack([np.ravel(prediction.outputs(filter, tau, name)) for name in domains])


@identity(
    "G1.kernel",
    "The tangent kernel is the Gram matrix of the Jacobian in the parameters, whichever way it is computed.",
    R"K = J J^\top,\quad J = \partial f/\partial\theta",
    parameters={"gain": NETWORK["gain"]},
    tolerance=1e-8,
)
def g1_kernel(normal: Normal, gain: float) -> Sides:
    """By factors and generically, (2, n·k, n·k), relative to the network's own size."""
    instance = _Instance(normal, gain, 0)
    kernels = [kernel(_apply, instance.weights, instance.x[1], instance.x[0], structured=s) for s in (True, False)]
    size = SAMPLES * OUTPUTS
    expected = instance.J[1] @ instance.J[0].T
    return np.stack([np.asarray(K).reshape(size, size) for K in kernels]), np.stack([expected, expected])


@identity(
    "G1",
    "One kernel gives the outputs of the linearised model on every domain, for every filter, τ and sample weights.",
    R"f = f_1 + \tau\,K(x,X)W^{1/2}\,U g(s) U^\top W^{1/2}(y - f_1)/n",
    parameters=NETWORK | {"penalty": PENALTY.within(1e-2, 10.0), "steps": Parameter(low=1, high=30, scale="whole")},
    tolerance=1e-7,
)
def g1(normal: Normal, gain: float, weighted: int, tau: float, penalty: float, steps: int) -> Sides:
    """Ridge and descent on training, test and other samples (2, 3, n·k)."""
    instance = _Instance(normal, gain, weighted)
    prediction = instance.predict()
    rate = 1.0 / float(prediction.eigenvalues.max())
    J, residual, w = instance.J[0], instance.y[0].ravel() - instance.outputs[0], instance.sample_weights
    descended = np.zeros(J.shape[1])
    for _ in range(steps):
        descended = descended + rate * J.T @ (np.repeat(w, OUTPUTS) * (residual - J @ descended)) / SAMPLES
    filters = [Ridge(penalty), GradientDescent(rate, steps)]
    predicted = np.array([_everywhere(prediction, filter, tau) for filter in filters])
    return predicted, np.stack(
        [instance.outputs + tau * instance.J @ step for step in (instance.fitted(penalty), descended)]
    )


@identity(
    "G1.linear",
    "A network that is linear in its parameters, really trained by gradient descent, ends where it was predicted to.",
    R"f_\theta(x) = \text{prediction, both losses, every }\tau",
    parameters={
        "tau": NETWORK["tau"],
        "speed": Parameter(low=0.1, high=1.9),  # η·s_max
        "steps": Parameter(low=1, high=40, scale="whole"),
        "entropy": Parameter(low=0, high=1, scale="whole"),
    },
    tolerance=1e-8,
)
def g1_linear(normal: Normal, tau: float, speed: float, steps: int, entropy: int) -> Sides:
    """Outputs on training, test and other samples (3, n·k)."""
    x, start = normal(3, SAMPLES, INPUTS), normal(INPUTS, OUTPUTS)
    labels = normal(3, SAMPLES, OUTPUTS)
    if entropy:
        labels = np.exp(labels) / np.exp(labels).sum(-1, keepdims=True)
    rate = speed * SAMPLES / np.linalg.norm(x[0], 2) ** 2
    weights = start
    for _ in range(steps):
        z = x[0] @ weights
        model = np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)
        weights = weights + rate * x[0].T @ (labels[0] - (model if entropy else z)) / SAMPLES
    loss: Any = "entropy" if entropy else "squared"
    pairs = list(zip(x, labels))
    prediction = predict(_linear, start, *pairs, loss=loss, plan=GradientDescent(rate, 1), noise_std=0.0)
    filter = GradientDescent(rate, steps)
    predicted = _everywhere(prediction, filter, tau)
    return predicted, (x @ ((1 - tau) * start + tau * weights)).reshape(3, -1)


def _linear(weights: Any, x: Any) -> Any:
    return x @ weights


@identity(
    "G1.leave_one_out",
    "With k outputs, leaving a sample out is a k × k system: the model refitted without it misses it by that much.",
    R"r_i - \tau\,(r_i - G_{ii}^{-1}(Gr)_i),\quad G = (JJ^\top + n\lambda I)^{-1}",
    parameters=NETWORK | {"penalty": PENALTY.within(1e-2, 10.0)},
    tolerance=1e-6,
)
def g1_leave_one_out(normal: Normal, gain: float, weighted: int, tau: float, penalty: float) -> Sides:
    """(n, k), beside n refits in the weights of the network."""
    instance = _Instance(normal, gain, weighted)
    refitted = []
    for i in range(SAMPLES):
        step = instance.fitted(penalty, np.arange(SAMPLES) != i)
        outputs = (instance.outputs[0] + tau * instance.J[0] @ step).reshape(SAMPLES, OUTPUTS)
        refitted.append(instance.y[0, i] - outputs[i])
    return np.asarray(leave_one_out(instance.predict(), penalty, tau)), np.array(refitted)


@statistical(
    "G1.variance",
    "Label noise adds τ²σ² tr(B g UᵀWU g Bᵀ)/m to the mean squared error, on whatever domain.",
    R"\mathrm{Var} = \tau^2\sigma^2\, g^\top(B^\top B\circ U^\top W U)\,g / m",
    parameters=NETWORK | {"penalty": PENALTY.within(1e-2, 10.0), "noise_std": Parameter(low=0.1, high=2.0)},
)
def g1_variance(normal: Normal, gain: float, weighted: int, tau: float, penalty: float, noise_std: float) -> Sides:
    """Test and other, from ridge fitted in the weights to pure noise (replicates, 2)."""
    instance = _Instance(normal, gain, weighted)
    prediction = instance.predict(noise_std=noise_std)
    stated = [prediction.along(Ridge(penalty), name)(tau).variance for name in ("test", "other")]
    J, w = instance.J[0], np.repeat(instance.sample_weights, OUTPUTS)
    noise = noise_std * normal(SAMPLES * OUTPUTS, 512)
    steps = np.linalg.solve(J.T @ (w[:, None] * J) + SAMPLES * penalty * np.eye(J.shape[1]), J.T @ (w[:, None] * noise))
    return np.array(stated), (((tau * instance.J[1:] @ steps) ** 2).sum(1) / SAMPLES).T


@identity(
    "G1.entropy",
    "Cross-entropy flows in function space as in the weights of the linear model, and takes the other outputs along.",
    R"\dot\alpha = U^\top W^{1/2}(y - \mathrm{softmax}(f_1 + B\alpha))",
    parameters={"gain": NETWORK["gain"], "weighted": NETWORK["weighted"], "time": TIME.within(0.1, 3.0)},
    tolerance=1e-5,
)
def g1_entropy(normal: Normal, gain: float, weighted: int, time: float) -> Sides:
    """Outputs on the three domains (3, n·k), beside fixed Runge-Kutta steps in the linear model's weights."""
    instance = _Instance(normal, gain, weighted)
    instance.y = np.exp(instance.y) / np.exp(instance.y).sum(-1, keepdims=True)
    J, w = instance.J[0], instance.sample_weights[:, None]

    def velocity(step: np.ndarray) -> np.ndarray:
        z = np.exp((instance.outputs[0] + J @ step).reshape(SAMPLES, OUTPUTS))
        return J.T @ (w * (instance.y[0] - z / z.sum(1, keepdims=True))).ravel() / SAMPLES

    step, count = np.zeros(J.shape[1]), 20 + int(4 * time * np.linalg.norm(J, 2) ** 2 * w.max() / SAMPLES)
    h = time / count
    for _ in range(count):
        a = velocity(step)
        b = velocity(step + h / 2 * a)
        c = velocity(step + h / 2 * b)
        step = step + h / 6 * (a + 2 * b + 2 * c + velocity(step + h * c))
    prediction = instance.predict(loss="entropy", plan=GradientFlow(time))
    return _everywhere(prediction, GradientFlow(time), 1.0), instance.outputs + instance.J @ step


@identity(
    "G2",
    "As many kernel-vector products as the kernel has dimensions give what the kernel gives, for every filter at once.",
    R"g(K)r = \|r\|\,V g(T) e_1",
    parameters=NETWORK | {"penalty": PENALTY.within(1e-2, 10.0), "time": TIME.within(0.1, 100.0)},
    tolerance=1e-6,
)
def g2(normal: Normal, gain: float, weighted: int, tau: float, penalty: float, time: float) -> Sides:
    """Outputs of ridge and flow on the three domains (2, 3, n·k), beside the numeric Jacobian's singular values."""
    instance = _Instance(normal, gain, weighted)
    prediction = instance.predict(products=SAMPLES * OUTPUTS)
    got = [_everywhere(prediction, filter, tau) for filter in (Ridge(penalty), GradientFlow(time))]
    root = np.repeat(instance.sample_weights**0.5, OUTPUTS)
    left, s, right = np.linalg.svd(root[:, None] * instance.J[0] / SAMPLES**0.5, full_matrices=False)
    c = left.T @ (root * (instance.y[0].ravel() - instance.outputs[0])) / SAMPLES**0.5
    flowed = np.where(s > 1e-9 * s.max(), -np.expm1(-time * s**2) / np.maximum(s, 1e-9 * s.max()), time * s)
    steps = [right.T @ (s / (s**2 + penalty) * c), right.T @ (flowed * c)]
    return np.array(got), np.stack([instance.outputs + tau * instance.J @ step for step in steps])


@inequality(
    "G2.error",
    "What few products leave undone is less than the error they state, whatever the spectrum.",
    R"\|K(g(K)r - V g(T)V^\top r)\| \le \textstyle\sum_i\max_z|z\,h_i(z)|",
    parameters={
        "decay": Parameter(low=0.0, high=12.0),
        "clusters": Parameter(low=1, high=40, scale="whole"),
        "rank": Parameter(low=4, high=40, scale="whole"),
        "products": Parameter(low=0, high=2, scale="whole"),
        "time": TIME.within(1.0, 1e5),
        "penalty": PENALTY.within(1e-5, 1.0),
    },
    tolerance=1e-9,
)
def g2_error(
    normal: Normal, decay: float, clusters: int, rank: int, products: int, time: float, penalty: float
) -> Sides:
    """Ridge and flow, two starting vectors (2, 2), relative to the size of the result; s_max = 1."""
    n = 40
    levels = np.exp(-decay * np.arange(clusters) / clusters)
    s = np.sort(levels[np.arange(n) % clusters] * np.exp(1e-3 * normal(n)))[::-1] * (np.arange(n) < rank)
    s = s / s.max()
    U, _ = np.linalg.qr(normal(n, n))
    matrix, r = (U * s) @ U.T, normal(n, 2)
    result = krylov(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(r), (3, 6, 12)[products])
    missed, stated = [], []
    for filter, exact in ((Ridge(penalty), s / (s + penalty)), (GradientFlow(time), -np.expm1(-time * s))):
        right = (U * exact) @ U.T @ r
        size = np.linalg.norm(right, axis=0)
        missed.append(np.linalg.norm(right - matrix @ np.asarray(result.apply(filter)), axis=0) / size)
        stated.append(np.asarray(result.error(filter)) / size)
    return np.array(missed), np.array(stated)


RUN = {
    "gain": NETWORK["gain"],
    "steps": Parameter(low=1, high=30, scale="whole"),
    "speed": Parameter(low=0.1, high=1.0),  # η·s_max
}
"""A network and its fine-tuning by gradient descent."""


def _missed(normal: Normal, gain: float, steps: int, speed: float, reach: float) -> float:
    """How far a real run ends from its prediction on all three domains, over how far the prediction goes.

    Labels are `reach` away from what the network says; the run is plain numpy.
    """
    instance = _Instance(normal, gain, 0)
    instance.y = instance.outputs.reshape(instance.y.shape) + reach * instance.y
    prediction = instance.predict(plan=GradientDescent(1e-3, 1), noise_std=0.0)
    rate = speed / float(prediction.eigenvalues.max())
    x, (first, bias, last) = instance.x[0], (np.array(instance.weights[name]) for name in instance.shapes)
    for _ in range(steps):
        hidden = np.tanh(x @ first + bias)
        missing = (instance.y[0] - hidden @ last) / SAMPLES
        back = missing @ last.T * (1 - hidden**2)
        last = last + rate * hidden.T @ missing
        first, bias = first + rate * x.T @ back, bias + rate * back.sum(0)
    real = (np.tanh(instance.x @ first + bias) @ last).reshape(3, -1)
    predicted = _everywhere(prediction, GradientDescent(rate, steps), 1.0)
    return float(np.linalg.norm(real - predicted) / np.linalg.norm(predicted - instance.outputs))


@inequality(
    "G3.lazy",
    "A run that has little to learn ends where the tangent features say it will.",
    R"\|f_{\hat\theta} - \text{prediction}\| \le 0.05\,\|\text{prediction} - f_1\|",
    parameters=RUN | {"reach": Parameter(low=1e-6, high=1e-4, scale="log")},
)
def g3_lazy(normal: Normal, **values: Any) -> Sides:
    return _missed(normal, **values), 0.05


@existence(
    "G3",
    "A run that has much to learn ends near its prediction too: true in part of the space only.",
    R"\|f_{\hat\theta} - \text{prediction}\| \le 0.05\,\|\text{prediction} - f_1\|",
    parameters=RUN | {"reach": Parameter(low=1e-2, high=3.0, scale="log")},
)
def g3(normal: Normal, **values: Any) -> Sides:
    return _missed(normal, **values), 0.05
