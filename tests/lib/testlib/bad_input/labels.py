"""Bad labels, for fine-tuning and for scoring."""

from testlib.bad_input.row import Bad

TUNE = "finetune lm --train train.jsonl --dev dev.jsonl --out new"
SCORE = "evaluate expert --test bad.jsonl"
DROP = "drop_labels"


def _labels(*labels: object, name: str = "train.jsonl"):
    """Return a function that writes a file with these labels; ``...`` means no label."""
    rows = [{"text": "a river", "label": one} for one in labels]
    kept = [{k: v for k, v in row.items() if v is not ...} for row in rows]
    return lambda place: place.rows(name, *kept)


def _raw(content: str | bytes, name: str = "train.jsonl"):
    return lambda place: place.write(name, content)


def _ranked(**other: object):
    """A file of queries and documents, of which the third row has something else."""
    row = {"query": "a river", "document": "old city", "label": 1, "group": 7}
    rows = [row, row | {"document": "light", "label": 0}, row | other]
    return lambda place: [place.rows("train.jsonl", *rows), place.rows("dev.jsonl", *rows[:2])]


ROWS = (
    Bad("no such file of labels", "finetune lm --train none.jsonl --dev dev.jsonl --out new",
        "'none.jsonl'", "no such file", "give a jsonl, csv, tsv or parquet file"),
    Bad("a folder as the file of labels",
        "finetune lm --train tokens --dev dev.jsonl --out new", "'tokens'",
        "is not a file", "give a jsonl, csv, tsv or parquet file"),
    Bad("labels in an unknown file format",
        "finetune lm --train run.yaml --dev dev.jsonl --out new",
        "run.yaml", "unknown type of file", "rename or convert it"),
    Bad("an empty file of labels", TUNE, "dev.jsonl", "has no rows", "at least one labelled",
        _raw("", "dev.jsonl")),
    Bad("a binary file of labels",
        TUNE, "train.jsonl", "it is not UTF-8 text", "convert or replace it",
        _raw(bytes(range(256)))),
    Bad("a truncated labelled row", TUNE, "train.jsonl:2", "not JSON",
        "each line must be one object", _raw('{"text": "a", "label": "good"}\n{"text": "b", ')),
    Bad("a missing label", TUNE, "train.jsonl, row 2", "label is missing", DROP,
        _labels("good", ...)),
    Bad("a score that is NaN", TUNE, "train.jsonl, row 2", "label is missing (given: nan)", DROP,
        _labels(0.5, float("nan"))),
    Bad("an infinite score", TUNE, "train.jsonl, row 2", "a number must be finite", "drop the row",
        _labels(0.5, float("inf"))),
    Bad("a negative grade", TUNE, "train.jsonl, row 3", "label -1 is negative",
        "add a number that makes the least 0", _ranked(label=-1)),
    Bad("a grade that is NaN", TUNE, "train.jsonl, row 3", "label is missing (given: nan)", DROP,
        _ranked(label=float("nan"))),
    Bad("grades and clicks in one file", TUNE, "label True is a boolean, but row 1 has 1",
        "one kind throughout", "", _ranked(label=True)),
    Bad("a graded document without a group", TUNE, "train.jsonl, row 3",
        "group must be the id of the row's query", "documents of one query have the same",
        _ranked(group=None)),
    Bad("a group in two splits", TUNE, "dev.jsonl, row 1", "the group '7' with its query is",
        "Put them into one file", _ranked()),
    Bad("no such group field in the labels", f"{TUNE} --set group_field=qid", "train.jsonl",
        "has no column 'qid' (it has: query, document, label, group)", "group_field=",
        _ranked()),
    Bad("groups in which all grades are equal",
        "finetune lm --train dev.jsonl --dev dev.jsonl --out new",
        "has 1 group, and in none are there documents of different", "no order is better",
        "less relevant", lambda place: place.rows(
            "dev.jsonl", *[{"query": "a", "document": d, "label": 1} for d in "bc"])),
    Bad("a class in dev that train lacks", TUNE, "dev.jsonl, row 1: label 'awful'",
        "does not occur in train.jsonl", "Correct the label",
        _labels("awful", name="dev.jsonl")),
    Bad("only one class", TUNE, "every label is 'good'", "needs at least two classes", "",
        _labels("good", "good")),
    Bad("words and numbers as labels in one file",
        TUNE, "label 0.3", "is a number, but row 1 has 'good', a word",
        "use one type of label", _labels("good", 0.3)),
    Bad("a JSON object as label", TUNE, "train.jsonl, row 1",
        "must be a class name, a number or a list of numbers", "given: {'x': 1}",
        _labels({"x": 1}, {"x": 2})),
    Bad("-1 beside classes", TUNE, "label '-1'", "may be a class, or mean that there is no label",
        "drop_labels=[-1]", _labels(0, 1, -1)),
    Bad("one class name in upper and lower case",
        TUNE, "label 'Good'", "differ only in blanks or case",
        "write both alike", _labels("good", "Good", "bad")),
    Bad("scores in train, classes in dev", TUNE, "dev.jsonl, row 1: label 'good'",
        "the train labels are scores", "give numbers here", _labels(0.5, 0.7)),
    Bad("no such label column", f"{TUNE} --label-field gold", "train.jsonl",
        "has no column 'gold' (it has: text, label)", "--label-field"),
    Bad("a number in place of a labelled text", TUNE, "train.jsonl, row 1", "text must be a string",
        "given: 1", lambda place: place.rows("train.jsonl", {"text": 1, "label": "good"})),
    Bad("labelled texts that are all blank", TUNE, "train.jsonl", "has no text in any of its rows",
        "--text-field", lambda place: place.rows(
            "train.jsonl", {"text": "", "label": "good"}, {"text": " ", "label": "bad"})),
    Bad("words in train, texts in dev", TUNE, "train.jsonl has tokens but dev.jsonl has texts",
        "all of one kind", "name their fields",
        lambda place: place.rows("train.jsonl", {"tokens": ["a", "b"], "tags": ["O", "O"]})),
    Bad("a metric for another task", f"{TUNE} --metric pearson", "'pearson'", "does not fit",
        "use one of: accuracy"),
    Bad("an unknown positive class", f"{TUNE} --set positive=great --metric f1",
        "positive is 'great'", "the labels are bad, good", "name one of two classes"),
    Bad("every label dropped", f"{TUNE} --set 'drop_labels=[good, bad]'", "train.jsonl",
        "drop_labels leaves none of its 8 rows"),
    Bad("epochs below 0", f"{TUNE} --set epochs=-1", "epochs", "greater than or equal to 0",
        "or 'auto'"),
    Bad("several seeds without training", f"{TUNE} --set epochs=0 --seeds 2", "epochs=0",
        "nothing is trained", "leave --seeds out"),
    Bad("labels that the expert does not know", SCORE, "bad.jsonl, row 1",
        "does not know the label 'awful'; it knows 2: good, bad", "check the model, the file",
        _labels("awful", name="bad.jsonl")),
    Bad("the labels of another task", SCORE, "the expert 'expert'",
        "does not know the label '0.25'", "check the model, the file",
        _labels(0.25, name="bad.jsonl")),
    Bad("labels for a model without a trained head", "evaluate lm --test dev.jsonl", "'lm'",
        "without a trained head", "`pipeline finetune lm --train"),
    Bad("no such head", "evaluate student --head xx --test dev.jsonl", "not 'xx'",
        "has the task heads expert", "fine-tune it"),
    Bad("--head for an expert", "evaluate expert --head xx --test dev.jsonl", "'expert' has none",
        "--head is for students with task heads", "leave it out"),
    Bad("a head from a plain language model", f"{TUNE} --head expert", "'lm' has no task heads",
        "not 'expert'", "leave head out"),
    Bad("--head that no run has", "compare student --test xx=dev.jsonl",
        "none is called 'xx'", "the runs have the heads expert",
        "A distill term for a task expert"),
    Bad("no such file to compare on", "compare student --test none.jsonl", "--test none.jsonl",
        "there is no file", "give a jsonl"),
)  # fmt: skip
