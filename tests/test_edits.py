"""Edit sets in every format people have, and the report on a set that cannot be edited as it stands."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from language import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from curvlab.data.edits import Request, check_requests, load_edits, without_contradictions

ADA = Request(
    "Ada was born in",
    "Paris",
    subject="Ada",
    paraphrases=("The birthplace of Ada is", "Ada comes from"),
    neighbours=(("Alan was born in", "London"), ("Eva was born in", "Rome")),
    truth="London",
)
BOB = Request("In which year was Bob born?", "1815")

FORMATS: dict[str, list[dict[str, Any]]] = {
    "EasyEdit, lists": [
        {
            "prompt": "Ada was born in",
            "target_new": "Paris",
            "subject": "Ada",
            "ground_truth": ["London", "Marylebone"],
            "rephrase_prompt": ["The birthplace of Ada is", "Ada comes from"],
            "locality_prompt": ["Alan was born in", "Eva was born in"],
            "locality_ground_truth": ["London", "Rome"],
        },
        {"prompt": "In which year was Bob born? ", "target_new": 1815, "rephrase_prompt": "", "locality_prompt": None},
    ],
    "EasyEdit, KnowEdit's nesting": [
        {
            "prompt": "Ada was born in",
            "target_new": "Paris",
            "subject": "Ada",
            "ground_truth": "London",
            "rephrase": ["The birthplace of Ada is", "Ada comes from"],
            "portability": {"Reasoning": [{"prompt": "Ada's country is", "ground_truth": [["France"]]}]},
            "locality": {
                "Relation_Specificity": [{"prompt": "Alan was born in", "ground_truth": [["London", "the capital"]]}],
                "Forgetfulness": [{"prompt": "Eva was born in", "ground_truth": [["Rome"]]}],
            },
        },
        {"prompt": "In which year was Bob born?", "target_new": "1815", "locality": {}},
    ],
    "ROME's CounterFact": [
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "{} was born in",
                "subject": "Ada",
                "target_new": {"str": "Paris", "id": "Q90"},
                "target_true": {"str": "London", "id": "Q84"},
            },
            "paraphrase_prompts": ["The birthplace of Ada is", "Ada comes from"],
            "neighborhood_prompts": [],
        },
        {
            "requested_rewrite": {
                "prompt": "In which year was {} born?",
                "subject": "Bob",
                "target_new": {"str": "1815"},
                "target_true": {"str": "1999"},
            },
            "neighborhood_prompts": ["In which year was Eva born?", "In which year was Al born?"],
        },
    ],
    "plain": [
        {
            "prompt": "Ada was born in ",
            "target": " Paris",
            "subject": "Ada",
            "truth": "London",
            "paraphrases": ["The birthplace of Ada is", "Ada comes from"],
            "neighbours": [["Alan was born in", "London"], {"prompt": "Eva was born in", "answer": "Rome"}],
        },
        {"prompt": "In which year was Bob born?", "target": 1815},
    ],
}
ROME = [
    Request(ADA.prompt, "Paris", "Ada", ADA.paraphrases, (), "London"),
    Request(
        BOB.prompt,
        "1815",
        "Bob",
        neighbours=(("In which year was Eva born?", "1999"), ("In which year was Al born?", "1999")),
        truth="1999",
    ),
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n" if lines else json.dumps(records, indent=1))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_requests(name: str, suffix: str, tmp_path: Path) -> None:
    expected = ROME if name.startswith("ROME") else [ADA, BOB]
    assert load_edits(write(tmp_path / f"edits{suffix}", FORMATS[name])) == expected


def test_zsre(tmp_path: Path) -> None:
    record = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology", "IIT"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
    }
    assert load_edits(write(tmp_path / "zsre.json", [record])) == [
        Request(
            "What university did Watts Humphrey attend?",
            "University of Michigan",
            "Watts Humphrey",
            ("What university did Watts Humphrey take part in?",),
            (("Who played desmond doss father in hacksaw ridge?", "Hugo Weaving"),),
            "Illinois Institute of Technology",
        )
    ]


def test_wikibigedit_as_published(tmp_path: Path) -> None:
    record = {"tag": "new", "subject": "Ada", "update": "Where was Ada born?", "rephrase": "Ada's birthplace?"}
    record |= {"ans": "Paris", "personas": "Ay, where?", "loc": "Where was Alan born?", "loc_ans": "London"}
    found = load_edits(write(tmp_path / "wiki.json", [record]))
    assert found == [
        Request("Where was Ada born?", "Paris", "Ada", ("Ada's birthplace?",), (("Where was Alan born?", "London"),))
    ]


def named_set(folder: Path, n: int = 50) -> Path:
    records = [{"prompt": f"Person {i} was born in", "target_new": f"Town {i}"} for i in range(n)]
    records.insert(7, {"prompt": "Person 3 was born in", "target_new": "another town"})
    (folder / "edits").mkdir()
    write(folder / "edits" / "counterfact.json", records)
    return folder


def test_named_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = named_set(tmp_path)
    found = load_edits("counterfact", data=data)
    assert [request.target for request in found] == [f"Town {i}" for i in range(50)]  # the first of a prompt counts
    monkeypatch.setenv("CURVLAB_DATA", str(data))
    assert load_edits("counterfact") == found
    assert len(load_edits(data / "edits" / "counterfact.json")) == 51  # a file is taken as it is


def test_named_sets_do_not_contradict_themselves(tmp_path: Path) -> None:
    """Whatever is drawn: a paraphrase is left out for what the whole set asks."""
    asked = ["Is Ada from here?", "Ada's town?"]
    records = [{"src": f"Where was Ada {i} born?", "alt": f"Town {i}", "rephrase": asked} for i in (1, 2)]
    records += [{"src": asked[0], "alt": "Town 1", "rephrase": ["Ada, where?"]}]
    (tmp_path / "edits").mkdir()
    path = write(tmp_path / "edits" / "zsre.json", records)
    found = load_edits("zsre", data=tmp_path)
    assert [request.paraphrases for request in found] == [(asked[0],), (), ("Ada, where?",)]
    assert load_edits("zsre", 1, data=tmp_path)[0] in found
    assert load_edits(path)[0].paraphrases == tuple(asked)  # a file is taken as it is


def test_drawing_is_nested_and_by_seed(tmp_path: Path) -> None:
    data = named_set(tmp_path)
    few, many = load_edits("counterfact", 10, seed=3, data=data), load_edits("counterfact", 40, seed=3, data=data)
    assert many[:10] == few
    assert len({request.prompt for request in many}) == 40
    assert load_edits("counterfact", 10, seed=4, data=data) != few
    assert set(load_edits("counterfact", 50, data=data)) == set(load_edits("counterfact", data=data))
    with pytest.raises(ValueError, match=r"51 of the 50 requests"):
        load_edits("counterfact", 51, data=data)
    with pytest.raises(ValueError, match=r"0 of the 50 requests"):
        load_edits("counterfact", 0, data=data)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CURVLAB_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="CURVLAB_DATA"):
        load_edits("zsre")
    with pytest.raises(FileNotFoundError, match=r"wikibigedit\.json or .*wikibigedit_sample\.json"):
        load_edits("wikibigedit", data=tmp_path)
    with pytest.raises(FileNotFoundError, match="counterfact, zsre, wikibigedit"):
        load_edits(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("[]", "holds no requests"),
        ('[{"prompt": "a", "target": "b"', r" is damaged JSON.*line 1"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": "c"', r", line 2 is damaged JSON"),
        ('["a", "b"]', r"record 0: expected an object"),
        ('[{"prompt": "a"}]', r"record 0: field 'target_new' is missing.*target"),
        ('[{"src": "a"}]', r"record 0: field 'alt' is missing"),
        ('[{"text": "a", "label": "b"}]', r"no known format has just the fields text, label"),
        (
            '[{"prompt": "a", "target": "b"}, {"prompt": "c"}]',
            r"JSONL format.*1 of 2.*\n.*record 1: field 'target' is m",
        ),
        ('[{"prompt": "a", "target_new": {"str": "b"}}]', r"record 0: field 'target_new' must be a text.*dict"),
        ('[{"prompt": "a", "target_new": "b", "rephrase_prompt": [1, true]}]', r"'rephrase_prompt'.*bool"),
        ('[{"prompt": "a", "target_new": "b", "locality_prompt": "c"}]', r"has 1 prompts but .*truth' 0 answers"),
        ('[{"src": "a", "alt": "b", "loc": ["c", "d", "e"], "loc_ans": ["f", "g"]}]', r"'loc' has 3 .* 'loc_ans' 2"),
        ('[{"prompt": "a", "target": "b", "neighbours": ["c"]}]', r"'neighbours\[0\]' must hold \[prompt, answer\]"),
        ('[{"prompt": "a", "target": "b", "neighbours": [{"prompt": "c"}]}]', r"'neighbours\[0\]\.answer' is missing"),
        ('[{"requested_rewrite": {"prompt": "{}", "subject": "a", "target_new": {}}}]', r"target_new\.str' is missing"),
        ('[{"prompt": "a", "target": NaN}]', r"record 0: field 'target' must be a text .*got nan"),
        ('{"prompt": "a", "target": "b", "truth": 1e999}', r"line 1: field 'truth' must be a text .*got inf"),
        ('[{"prompt": "a \\ud83d b", "target": "c"}]', r"record 0: field 'prompt' holds the lone surrogate '\\ud83d'"),
        (
            '[{"prompt": "a", "target": "b", "neighbours": [["c", "\\ude00"]]}]',
            r"record 0: field 'neighbours\[0\]\[1\]' holds the lone surrogate",
        ),
        (
            '[{"prompt": "a", "target_new": "b", "locality": {"n": {"prompt": ["c", ""], "ground_truth": ["", "d"]}}}]',
            r"field 'locality\.n\.ground_truth' is empty in place 0, 'locality\.n\.prompt' is 'c'",
        ),
        (
            '[{"src": "a", "alt": "b", "loc": ["c", null], "loc_ans": ["d", "e"]}]',
            r"field 'loc' is empty in place 1, 'loc_ans' is 'e'",
        ),
        ('[{"src": "a", "alt": "b", "loc": ["c", "d", ""], "loc_ans": ["e", "f"]}]', r"'loc' has 3 .* 'loc_ans' 2"),
        ('[{"prompt": "a", "target": "b", "neighbours": [["c", ""]]}]', r"'neighbours\[0\]\[1\]' is empty in place 0"),
    ],
)
def test_damaged_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"(?s)edits\.json.*" + message):
        load_edits(path)


def test_neighbours_that_are_empty_on_both_sides_are_left_out(tmp_path: Path) -> None:
    def neighbours(**fields: Any) -> tuple[tuple[str, str], ...]:
        record = {"prompt": "a", "target_new": "b", **fields}
        return load_edits(write(tmp_path / "edits.json", [record]))[0].neighbours

    def nested(prompt: Any, answer: Any) -> dict[str, Any]:
        return {"n": {"prompt": prompt, "ground_truth": answer}}

    assert neighbours(locality=nested(["c", "", "d"], ["e", None, ["f", "g"]])) == (("c", "e"), ("d", "f"))
    assert neighbours(locality=nested(["", "c"], [" ", "e"])) == (("c", "e"),)
    assert neighbours(locality=nested("c", ["", "e", "f"])) == (("c", "e"),)  # the first spelling that is one
    for prompt, answer in (([], []), ([], ""), ("", None), (["", ""], [""])):
        assert neighbours(locality=nested(prompt, answer)) == ()
        assert neighbours(locality_prompt=prompt, locality_ground_truth=answer) == ()
    assert neighbours(locality={"n": [["", ""], ["c", "e"]]}) == (("c", "e"),)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_bytes(b"[{\xff\xfe}]")
    with pytest.raises(ValueError, match="UTF-8"):
        load_edits(tmp_path / "edits.json")


def test_all_unusable_records_are_named(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"prompt": "a", "target": "b"}] * 9 + [{"prompt": "c"}] * 2 + [{"target": "d"}]
    with pytest.raises(ValueError, match=r"(?s)3 of 12.*line 10: .*'target'.*line 11: .*'target'.*line 12: .*'prompt'"):
        load_edits(write(tmp_path / "edits.jsonl", records))


# Checking


def words(*known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, others unknown."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<unk>", *known))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def letters(known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters that drops others without a word."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({c: i for i, c in enumerate(known)}, [])))


def problems(requests: list[Request], tokenizer: PreTrainedTokenizerFast, **options: int) -> list[str]:
    with pytest.raises(ValueError, match=r"problems? in") as caught:
        check_requests(requests, tokenizer, **options)
    head, *lines = str(caught.value).split("\n  ")
    assert head.startswith(f"{len(lines)} problem")
    return lines


def test_good_requests_pass() -> None:
    check_requests([ADA, BOB], tiny_tokenizer())
    check_requests([Request("Ada was", "é 語 \u200b x")], tiny_tokenizer(bos=False))
    check_requests([Request("Ada was", "born")], words("Ada", "was", "born"))


def test_every_problem_is_reported_at_once() -> None:
    requests = [
        ADA,
        Request("Bob was born in", " "),
        Request("", "Rome"),
        Request("Ada  was born in", "Paris"),
        Request("Ada was born in", "Rome"),
        Request("Eva was born in ", " Rome"),
        Request("Al was born in", "Rome", paraphrases=("",), neighbours=(("Di was born in", ""),)),
        Request("Flo was born in", "Rome</s>"),
        Request("Cy was born in", "Rome " * 300),
    ]
    found = problems(requests, tiny_tokenizer(), max_length=200)
    expected = [
        "request 1 ('Bob was born in'): the target is empty",
        "request 2 (''): the prompt is empty",
        "request 3 ('Ada  was born in'): the same as request 0 ('Ada was born in')",
        "request 4 ('Ada was born in'): asks for 'Rome' where request 0 ('Ada was born in') asks for 'Paris'",
        "request 5 ('Eva was born in '): the prompt begins or ends with white space",
        "request 5 ('Eva was born in '): the target begins or ends with white space",
        "request 6 ('Al was born in'): the paraphrase 0 is empty",
        "request 6 ('Al was born in'): the answer of neighbour 0 is empty",
        "request 7 ('Flo was born in'): the target holds the special token '</s>'",
        "request 8 ('Cy was born in'): the target begins or ends with white space",
        "request 8 ('Cy was born in'): the prompt and its answer have",
    ]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_unknown_words() -> None:
    known = words("Ada", "was", "born", "in")
    request = Request("Ada was", "Paris", paraphrases=("Ada born",), neighbours=(("Bob was", "in"),))
    found = problems([request], known)
    starts = ["request 0 ('Ada was'): the target", "request 0 ('Ada was'): the neighbour 0"]
    assert [line.split(" cannot")[0] for line in found] == starts
    assert "'<unk>'" in found[0]


def test_characters_that_a_tokenizer_drops() -> None:
    found = problems([Request("Ada was", "bé語")], letters("Adawsb"))
    assert "the tokenizer drops 'é', '語'" in found[0]
    assert "has no token" in problems([Request("Ada was", "語")], letters("Adawsb"))[0]


def test_a_paraphrase_may_not_contradict_another_prompt() -> None:
    first = Request("Ada was born in", "Rome")
    again = Request("The birthplace of Ada is", "Paris", paraphrases=("Ada was  born in",))
    found = problems([first, again], tiny_tokenizer())
    assert len(found) == 1
    both = "asks for 'Paris' where request 0 ('Ada was born in') asks for 'Rome' ('Ada was  born in')"
    advice = "`without_contradictions` leaves it out"
    assert found[0] == f"request 1 ('The birthplace of Ada is'): a paraphrase {both}; {advice}"
    same = Request("The birthplace of Ada is", "Rome", paraphrases=("Ada was born in",))
    check_requests([first, same], tiny_tokenizer())
    assert without_contradictions([first, again, same]) == [first, replace(again, paraphrases=()), same]
    check_requests(without_contradictions([first, again]), tiny_tokenizer())


def test_one_paraphrase_may_not_have_two_targets() -> None:
    asked = "Where is Ada from?"
    rome = Request("Ada was born in", "Rome", paraphrases=(asked, "Ada is from"))
    paris = Request("Ada comes from", "Paris", paraphrases=("Her town is", "Where  is Ada from?"))
    alike = Request("Ada's town is", "ROME", paraphrases=("Ada is from",))
    found = problems([rome, paris, alike], tiny_tokenizer())
    assert len(found) == 1
    assert found[0].startswith("request 1 ('Ada comes from'): a paraphrase asks for 'Paris' where request 0 (")
    assert "without_contradictions" in found[0]
    kept = without_contradictions([rome, paris, alike])
    assert kept == [replace(rome, paraphrases=("Ada is from",)), replace(paris, paraphrases=("Her town is",)), alike]
    check_requests(kept, tiny_tokenizer())


def test_targets_that_differ_in_case_or_unicode_form_do_not_contradict() -> None:
    first = Request("Zoë ruled under", "Nguyễn dynasty")
    again = Request("Zoë's time was", unicodedata.normalize("NFD", "Nguyễn Dynasty"), paraphrases=(first.prompt,))
    check_requests([first, again], tiny_tokenizer())
    assert without_contradictions([first, again]) == [first, again]


def test_one_prompt_in_two_unicode_forms() -> None:
    """Prompts that look alike are alike, whatever their bytes."""
    forms = [unicodedata.normalize(form, "Zoë was born in") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    (found,) = problems([Request(forms[0], "Rome"), Request(forms[1], "Paris")], tiny_tokenizer())
    assert "asks for 'Paris' where request 0 ('Zoë was born in') asks for 'Rome'" in found
    (found,) = problems([Request(forms[0], "Rome"), Request(forms[1], "rome")], tiny_tokenizer())
    assert "the same as request 0" in found


def test_without_contradictions_counts_the_first_and_all_other_targets_of_a_prompt() -> None:
    twice = [Request("Ada was born in", "Rome"), Request("Ada was born in", "Paris")]
    third = Request("Ada comes from", "Rome", paraphrases=("Ada was born in",))
    for order in ([*twice, third], [*twice[::-1], third]):
        kept = without_contradictions(order)
        assert kept[2].paraphrases == ()
        assert len(problems(kept, tiny_tokenizer())) == 1  # of the two prompts


def test_a_long_prompt_is_shortened() -> None:
    prompt = "The mother tongue of " + "Danielle " * 20 + "is"
    (found,) = problems([Request(prompt, "")], tiny_tokenizer())
    assert found == "request 0 ('The mother tongue of Danielle Danielle D …'): the target is empty"


BROKEN: dict[str, tuple[Any, str]] = {
    "no target": (Request("Ada was", None), "the target must be a text, got NoneType"),  # type: ignore[arg-type]
    "a number": (Request(1815, "Ada"), "request 1 ('1815'): the prompt must be a text, got int"),  # type: ignore[arg-type]
    "one paraphrase": (Request("Ada was", "a", paraphrases="Ada"), "the paraphrases must be a tuple, got str"),  # type: ignore[arg-type]
    "no neighbours": (Request("Ada was", "a", neighbours=None), "the neighbours must be a tuple, got NoneType"),  # type: ignore[arg-type]
    "three": (
        Request("Ada was", "a", neighbours=(("b", "c", "d"),)),  # type: ignore[arg-type]
        "the neighbour 0 must be (prompt, answer), got ('b', 'c', 'd')",
    ),
    "its answer": (
        Request("Ada was", "a", neighbours=(("b", 3),)),
        "the answer of neighbour 0 must be a text, got int",
    ),  # type: ignore[arg-type]
    "half a character": (Request("Ada \ud83d", "a"), "the prompt holds the lone surrogate '\\ud83d'"),
    "half a paraphrase": (Request("Ada was", "a", paraphrases=("b", "\ude00")), "the paraphrase 1 holds the lone surr"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests_are_problems_like_others(name: str) -> None:
    request, message = BROKEN[name]
    found = problems([BOB, request, Request("Eva was", " ")], tiny_tokenizer())
    assert len(found) == 2
    assert found[0].startswith("request 1 ('")
    assert message in found[0]
    assert "request 2 ('Eva was'): the target is empty" in found[1]
    with pytest.raises(ValueError, match=r"1 problems in 2 requests"):
        without_contradictions([BOB, request])


def test_no_requests() -> None:
    with pytest.raises(ValueError, match="no requests"):
        check_requests([], tiny_tokenizer())
    with pytest.raises(ValueError, match="must be a list of"):
        check_requests(["Ada"], tiny_tokenizer())  # type: ignore[list-item]


REAL = os.environ.get("CURVLAB_DATA", "")


@pytest.mark.skipif(not (Path(REAL) / "edits").is_dir(), reason="CURVLAB_DATA names no folder with edits")
@pytest.mark.parametrize("name", ["zsre", "counterfact"])
def test_draws_of_real_sets_can_be_edited(name: str) -> None:
    whole = load_edits(name, data=REAL)
    assert without_contradictions(whole) == whole
    for seed in range(20):
        check_requests(load_edits(name, 100, seed=seed, data=REAL), tiny_tokenizer())
    assert load_edits(name, 100, data=REAL)[:30] == load_edits(name, 30, data=REAL)
