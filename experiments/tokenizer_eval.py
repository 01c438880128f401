"""Compare the tokenizer's compression with GPT-2's and GPT-4's on texts of several kinds.

    torchrun launch.py --experiment=tokenizer_eval
    torchrun launch.py --experiment=tokenizer_eval --set data.source=embedded --set tokenizer=<folder>

Takes seconds, and once longer where tiktoken has to download the other two vocabularies; without a network they are
left out, with the reason. Prints bytes per token (more is better) for sample texts written for this purpose and for
the beginning of the training and validation splits, and how many more tokens the others need (+) or save (-).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from nanochat.config import UserError
from nanochat.data import DataConfig, sources, tokenizer

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

OTHERS = ("gpt2", "cl100k_base")

NEWS = """\
RIVERTON - After eleven years of hearings, lawsuits and two failed referendums, the city council voted 9 to \
4 on Tuesday night to tear down the Harlow Street dam and let the Wenlow River run free for the first time \
since 1923. The decision clears the way for a $48.6 million restoration project that officials hope to \
begin next spring.

"My grandmother used to tell me about salmon so thick you could hear them at night," said Councilwoman \
Teresa Okafor, who sponsored the measure. "I'd like my own grandchildren to be able to say they've heard it \
too." Opponents, among them the owners of 212 houses on the reservoir's shore, argued that the city had \
underestimated both the cost and the loss of property values. Their lawyer, Martin Haas, said an appeal was \
"more likely than not."

Engineers expect to lower the water by about 30 centimetres a day, beginning in April, to keep the banks \
from sliding. The state's fish and wildlife agency will monitor sediment downstream for at least five \
years. Similar removals on three other rivers in the region have brought fish back within two seasons, \
according to a report published in September."""

CODE = '''\
from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(order=True)
class Job:
    """A unit of work; jobs with a smaller priority run first."""

    priority: int
    name: str = field(compare=False)
    retries: int = field(default=3, compare=False)


def run_all(jobs: list[Job], execute) -> dict[str, str]:
    results: dict[str, str] = {}
    queue = list(jobs)
    heapq.heapify(queue)
    while queue:
        job = heapq.heappop(queue)
        try:
            results[job.name] = execute(job)
        except (TimeoutError, ConnectionError) as error:
            if job.retries == 0:
                results[job.name] = f"failed: {error!r}"
                continue
            job.retries -= 1
            job.priority += 10  # let the others go first
            heapq.heappush(queue, job)
    return results


if __name__ == "__main__":
    demo = [Job(5, "compress"), Job(1, "download"), Job(3, "verify", retries=0)]
    for name, result in sorted(run_all(demo, lambda job: f"{job.name}:ok").items()):
        print(f"{name:>12} -> {result}")
'''

MATHS = r"""\
\begin{lemma} Let $(a_n)_{n \ge 1}$ be a sequence of positive real numbers with $a_{m+n} \le a_m + a_n$ for all
$m, n \ge 1$. Then $\lim_{n \to \infty} \frac{a_n}{n}$ exists and equals $\inf_{n \ge 1} \frac{a_n}{n}$. \end{lemma}

\begin{proof} Fix $k \ge 1$ and write $n = qk + r$ with $0 \le r < k$. By induction $a_{qk} \le q\, a_k$, hence
\begin{equation} \frac{a_n}{n} \le \frac{q\, a_k}{qk + r} + \frac{\max_{1 \le j < k} a_j}{n}. \end{equation}
Letting $n \to \infty$ gives $\limsup_{n} a_n / n \le a_k / k$ for every $k$, so that
\[ \limsup_{n \to \infty} \frac{a_n}{n} \le \inf_{k \ge 1} \frac{a_k}{k} \le \liminf_{n \to \infty} \frac{a_n}{n}. \]
\end{proof}

For example, let $c_n$ be the number of self-avoiding walks of length $n$ on $\mathbb{Z}^2$. Cutting a walk in two shows
$c_{m+n} \le c_m c_n$, so $\log c_n$ is subadditive and $\mu = \lim_n c_n^{1/n}$ exists; numerically
$\mu \approx 2.638$.
"""

SCIENCE = """\
Photosynthesis converts light into chemical energy in two linked stages. In the light-dependent reactions, \
pigments in the thylakoid membrane absorb photons, mostly between 400 and 700 nm, and pass the excitation \
to the reaction centres of photosystems II and I. Water is oxidised (2 H2O -> O2 + 4 H+ + 4 e-), and the \
flow of electrons pumps protons into the lumen; their return through ATP synthase drives the \
phosphorylation of ADP.

In the Calvin-Benson cycle, the enzyme ribulose-1,5-bisphosphate carboxylase/oxygenase (RuBisCO) fixes CO2 \
in the stroma. Three turns yield one molecule of glyceraldehyde-3-phosphate at a cost of 9 ATP and 6 NADPH. \
Because RuBisCO also accepts oxygen, up to a quarter of the fixed carbon is lost to photorespiration at 25 \
degrees Celsius; C4 and CAM plants suppress the loss by concentrating CO2 around the enzyme. The maximum \
efficiency of conversion of solar radiation into biomass is thus about 4.6% in C3 plants and 6.0% in C4 \
plants."""

KOREAN = """\
어제 저녁 우리 동네 도서관에서 작은 음악회가 열렸다. 비가 많이 내렸는데도 백 명이 넘는 사람들이 모였고, \
의자가 모자라서 뒤에 서 있는 사람도 많았다. 첫 곡은 초등학생 네 명이 연주한 현악 사중주였는데, 조금 \
서툴렀지만 모두 큰 박수를 보냈다.

연주가 끝난 뒤에는 따뜻한 유자차를 마시면서 이야기를 나누었다. 도서관장은 앞으로 매달 마지막 금요일마다 \
이런 행사를 열 계획이라고 말했다. 입장료는 없으며, 누구나 홈페이지에서 미리 신청하면 참가할 수 있다고 한다. \
다음 달에는 시인 두 명이 자신의 작품을 낭독할 예정이다."""

GERMAN = """\
Der Zug nach Oberstdorf hatte wieder einmal fünfundzwanzig Minuten Verspätung, und auf dem Bahnsteig wurde \
es allmählich ungemütlich kühl. „Das ist seit der Fahrplanumstellung jede Woche so“, schimpfte eine ältere \
Dame und zog ihren Schal fester. Der Schaffner entschuldigte sich freundlich, konnte aber über die Ursache \
der Störung nichts Genaueres sagen.

Schließlich ging es doch noch los. Hinter Immenstadt lag bereits Schnee auf den Wiesen, die Kinder drückten \
sich an den Fenstern die Nasen platt, und aus den Thermoskannen duftete es nach Früchtetee. Niemand dachte \
mehr an die Verspätung."""

CHINESE = """\
清晨的市场总是最热闹的。卖豆腐的老王一边招呼客人，一边把刚出锅的豆浆倒进碗里，热气在冷空气中慢慢散开。旁边的\
水果摊上堆满了苹果、柿子和橘子，颜色十分好看。

小李每个周末都会带着女儿来这里买菜。她说，超市虽然方便，但是没有这种味道：可以和摊主聊天，可以尝一块甜瓜，还\
可以讨价还价。今年市政府打算把市场翻修一遍，预计花费三百万元，摊主们既期待又有点担心。"""

SAMPLES = {
    "news": NEWS,
    "code": CODE,
    "maths": MATHS,
    "science": SCIENCE,
    "korean": KOREAN,
    "german": GERMAN,
    "chinese": CHINESE,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    Attributes:
        tokenizer: folder of our tokenizer; none: the one that the tokenizer experiment saves.
        max_chars: characters of each split to encode.
        download_seconds: how long to wait for tiktoken's downloads.
    """

    data: DataConfig = DataConfig()
    tokenizer: str | None = None
    max_chars: int = 2_000_000
    download_seconds: float = 60.0


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Encode every text with every tokenizer and print the table."""
    if not runtime.is_main:
        return
    folder = Path(config.tokenizer) if config.tokenizer else tokenizer.default_dir()
    ours = tokenizer.load(folder)
    encoders: dict[str, Callable[[str], list[int]]] = {"ours": ours.encode}
    print(f"ours         {ours.vocab_size:>8,} tokens, {folder}")
    for name, other in others(config.download_seconds).items():
        if isinstance(other, str):
            print(f"{name:<12} left out: {other}")
        else:
            print(f"{name:<12} {other.n_vocab:>8,} tokens")
            encoders[name] = other.encode_ordinary
    texts = {name: [text] for name, text in SAMPLES.items()}
    for split in ("train", "val"):
        try:
            texts[split] = beginning(config, split)
        except UserError as error:
            print(f"{split:<12} left out: {error}")
    print()
    print("\n".join(table(texts, encoders)))


def others(seconds: float) -> dict[str, tiktoken.Encoding | str]:
    """Return tiktoken's encodings, or for each the reason why it is not to be had.

    tiktoken downloads them on first use and sets no limit of time, hence the threads.
    """
    found: dict[str, tiktoken.Encoding | str] = {}

    def get(name: str) -> None:
        try:
            found[name] = tiktoken.get_encoding(name)
        except Exception as error:  # any trouble of the network
            found[name] = f"tiktoken cannot download it ({type(error).__name__})"

    threads = [threading.Thread(target=get, args=(name,), daemon=True) for name in OTHERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return {name: found.get(name, f"no answer from tiktoken's download in {seconds:g} s") for name in OTHERS}


def beginning(config: Config, split: str) -> list[str]:
    """Return the first documents of a split, `max_chars` characters in all."""
    texts, chars = [], 0
    for text in sources.texts(config.data, "train" if split == "train" else "val"):
        texts.append(text[: config.max_chars - chars])
        chars += len(texts[-1])
        if chars >= config.max_chars:
            break
    return texts


def table(texts: dict[str, list[str]], encoders: dict[str, Callable[[str], list[int]]]) -> list[str]:
    """Return the lines of the table: bytes per token, and for the others the difference in tokens to the first."""
    first, *rest = encoders
    header = f"{'text':<10}{'bytes':>12}{first:>12}" + "".join(f"{name:>22}" for name in rest)
    lines = ["bytes per token (difference in tokens)", header, "-" * len(header)]
    for name, docs in texts.items():
        size = sum(len(doc.encode()) for doc in docs)
        counts = {key: sum(len(encode(doc)) for doc in docs) for key, encode in encoders.items()}
        line = f"{name:<10}{size:>12,}{size / counts[first]:>12.3f}"
        for key in rest:
            difference = f"({counts[key] / counts[first] - 1:+.1%})"
            line += f"{size / counts[key]:>12.3f}{difference:>10}"
        lines.append(line)
    return lines
