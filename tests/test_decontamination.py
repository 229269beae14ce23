"""Evaluation texts are found wherever they hide; other texts of the same language are not."""

from __future__ import annotations

import json
import pickle
import random
import unicodedata
from pathlib import Path

import pytest

from enc2gen.corpora.decontamination import EvaluationIndex
from enc2gen.errors import DataError

TEST_SENTENCES = {
    "kk": "Барлық адамдар тумысынан азат және қадір-қасиеті мен құқықтары тең болып дүниеге келеді.",
    "ug": "ھەممە ئادەم زاتىدىنلا ئەركىن، ئىززەت-ھۆرمەت ۋە ھوقۇقتا باپباراۋەر بولۇپ تۇغۇلغان.",
    "bo": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ།",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
}
PASSAGES = {
    "kk": "Қазақстанның оңтүстігінде бүгін жаңбыр жауады, ал солтүстігінде күн ашық болады деп күтілуде. ",
    "ug": "بۈگۈن ھاۋا ئوچۇق بولىدۇ، ئەتە بولسا يامغۇر ياغىدۇ دەپ مۆلچەرلەندى، شامال كۈچلۈك چىقىدۇ. ",
    "bo": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག སང་ཉིན་ཆར་པ་འབབ་རྒྱུ་རེད་ཟེར་གྱི་འདུག གནངས་ཉིན་རླུང་ཆེན་པོ་རྒྱག་རྒྱུ་རེད། ",
    "zh": "今天北方大部分地区天气晴朗，明天南方将有大到暴雨，请市民出门时注意安全并携带雨具。",
}


@pytest.fixture(scope="module")
def index() -> EvaluationIndex:
    return EvaluationIndex.from_texts(TEST_SENTENCES.values())


@pytest.mark.parametrize("tag", TEST_SENTENCES)
def test_a_test_sentence_is_found_in_every_disguise(index: EvaluationIndex, tag: str) -> None:
    sentence, passage = TEST_SENTENCES[tag], PASSAGES[tag]
    rng = random.Random(0)
    slightly = list(sentence)
    for place in rng.sample(range(len(sentence)), max(1, len(sentence) // 60)):
        slightly[place] = "x"
    disguises = [
        sentence,
        sentence.upper().replace(".", "!") + " ",
        passage * 20 + sentence + passage * 20,
        sentence[: int(len(sentence) * 0.8)],
        "".join(slightly),
    ]
    assert index.contaminated(disguises) == [True] * 5
    assert index.contaminated([passage, passage * 50, sentence[: len(sentence) // 6], "", " "]) == [False] * 5


def test_one_common_phrase_is_no_leak(index: EvaluationIndex) -> None:
    phrase = TEST_SENTENCES["kk"][:34]
    assert not any(index.contaminated([phrase + PASSAGES["kk"], PASSAGES["kk"] + phrase]))


@pytest.mark.parametrize("tag", TEST_SENTENCES)
def test_a_sentence_of_a_long_test_passage_is_found(tag: str) -> None:
    index = EvaluationIndex.from_texts([PASSAGES[tag] + TEST_SENTENCES[tag] * 2])
    assert index.contaminated([PASSAGES[tag], *TEST_SENTENCES.values()]) == [True, *(t == tag for t in TEST_SENTENCES)]


def test_shared_ngrams_of_several_texts_do_not_add_up() -> None:
    """A line with a little of each of many test texts is in none of them."""
    rng = random.Random(1)
    letters = "абвгдежзийклмнопрстуфхцчшщы "
    texts = ["".join(rng.choice(letters) for _ in range(200)) for _ in range(8)]
    patchwork = "".join(text[10:60] for text in texts)
    index = EvaluationIndex.from_texts(texts)
    assert index.contaminated([patchwork, patchwork + texts[0]]) == [False, True]


def test_evaluation_texts_do_not_run_into_each_other() -> None:
    rng = random.Random(2)
    first, second = ("".join(rng.choice("абвгдежзик") for _ in range(100)) for _ in range(2))
    seam = first[-25:] + second[:25]
    assert EvaluationIndex.from_texts([first, second]).contaminated([seam]) == [False]
    assert EvaluationIndex.from_texts([first + second]).contaminated([seam]) == [True]


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEST_SENTENCES.values(), *PASSAGES.values(), "", "short", "\ud800 lone"]
    whole = EvaluationIndex.from_texts(TEST_SENTENCES.values()).contaminated(texts)
    assert whole == [True] * 4 + [False] * 7
    monkeypatch.setattr("enc2gen.corpora.decontamination._BATCH_CHARACTERS", 50)
    assert EvaluationIndex.from_texts(TEST_SENTENCES.values()).contaminated(texts) == whole


def test_files_are_read_with_all_their_texts_but_labels(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [{"src": TEST_SENTENCES["kk"], "tgt": {"zh": TEST_SENTENCES["zh"]}, "label": "politics", "id": 7,
             "answers": [TEST_SENTENCES["bo"]]}]  # fmt: skip
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    index = EvaluationIndex.from_files([file])
    assert index.contaminated([*TEST_SENTENCES.values(), "politics"]) == [True, False, True, True, False]
    only = EvaluationIndex.from_files([str(file)], fields=["src"])
    assert only.contaminated(list(TEST_SENTENCES.values())) == [True, False, False, False]
    with pytest.raises(DataError, match="source"):
        EvaluationIndex.from_files([file], fields=["source"])
    with pytest.raises(DataError, match="no text of at least"):
        EvaluationIndex.from_files([file], fields=["label"])


def test_workers_get_an_equal_index(index: EvaluationIndex) -> None:
    copy = pickle.loads(pickle.dumps(index))
    texts = [*TEST_SENTENCES.values(), *PASSAGES.values()]
    assert copy.contaminated(texts) == index.contaminated(texts)


def test_texts_too_short_for_ngrams_are_still_compared_as_wholes() -> None:
    index = EvaluationIndex.from_texts(["Алматы қаласы."])
    assert index.contaminated(["алматы қаласы", "Алматы қаласы үлкен"]) == [True, False]


def test_unicode_forms_of_both_sides_do_not_matter() -> None:
    text = "Шетел тілдерін үйрену – өмірлік іс, әйтпесе қайтып білесің деді ойшыл йод"
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        index = EvaluationIndex.from_texts([unicodedata.normalize(form, text)])
        assert index.contaminated([unicodedata.normalize(other, text)]) == [True]


MIXED = [
    "これはTokyo Metropolitan UniversityのSmith教授が書いた本です。",
    "すもももももももものうちだという早口言葉を、子どものころによくくりかえした。",
    "1984年の映画The Terminatorの監督はJames Cameronである。",
    "委员会主席James Fitzgerald Kennedy说明了情况。",
    "カリフォルニアのゴールデンゲートブリッジはとてもうつくしい。",
]


def test_sentences_in_several_scripts_are_found_whatever_most_of_the_passage_is_in() -> None:
    """The n-grams of a sentence with more Latin letters or kana than Chinese characters are those of its passage."""
    for around in (PASSAGES["zh"] * 2, "The committee met again in London on the last day of the month. " * 3):
        passages = EvaluationIndex.from_texts([around + sentence + around for sentence in MIXED])
        assert passages.contaminated([*MIXED, PASSAGES["kk"]]) == [True] * len(MIXED) + [False]
        sentences = EvaluationIndex.from_texts(MIXED)
        assert sentences.contaminated([around + sentence for sentence in MIXED]) == [True] * len(MIXED)
        assert sentences.contaminated([around]) == [False]


def test_of_a_built_in_corpus_all_splits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"train": TEST_SENTENCES["kk"], "dev": TEST_SENTENCES["ug"], "test": TEST_SENTENCES["bo"]}

    def records(languages: list[str], *, split: str, max_per_origin: int) -> list[dict[str, str]]:
        return [{"target": text} for part, text in texts.items() if split in (part, "all")]

    monkeypatch.setattr("enc2gen.corpora.readers.localisation_records", records)
    index = EvaluationIndex.from_files([Path("builtin:localisation?languages=kk")])
    assert index.contaminated(list(TEST_SENTENCES.values())) == [True, True, True, False]


def test_of_a_hub_data_set_the_splits_for_evaluation_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {
        ("owner/flores", "kaz"): {"dev": TEST_SENTENCES["kk"], "devtest": TEST_SENTENCES["ug"]},
        ("owner/squad", None): {"train": TEST_SENTENCES["bo"], "validation": TEST_SENTENCES["zh"]},
        ("owner/corpus", None): {"train": TEST_SENTENCES["bo"]},
    }
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name, config: list(sets[name, config]))
    monkeypatch.setattr(
        "enc2gen.corpora.readers.hub_records",
        lambda name, config, split: iter([{"text": sets[name, config][split]}]),
    )
    sentences = list(TEST_SENTENCES.values())
    for source, expected in (
        ("hub:owner/flores:kaz", [True, True, False, False]),
        ("owner/squad", [False, False, False, True]),
        ("owner/flores:kaz|hub:owner/squad", [True, True, False, True]),
    ):
        assert EvaluationIndex.from_files([source]).contaminated(sentences) == expected
    with pytest.raises(DataError, match=r"no split for evaluation, only train[\s\S]*hub:owner/corpus/FILE"):
        EvaluationIndex.from_files([Path("hub:owner/corpus")])


def test_a_hub_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, config: str | None) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.get_dataset_split_names", unreachable)
    with pytest.raises(DataError, match=r"owner/set:kaz[\s\S]*no network[\s\S]*HF_HUB_OFFLINE"):
        EvaluationIndex.from_files(["owner/set:kaz"])
