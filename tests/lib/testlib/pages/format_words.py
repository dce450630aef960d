"""What docs/format.md says of each file, column and key: the page takes the names from the code."""

# What capital words in the names of files stand for.
LETTERS = {
    "UNIT": r"\d{5,12}(-r\d{3,6})?",
    "ATTEMPT": r"[0-9a-f]{8}",
    "TEACHER": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "PART": r"[a-z0-9.-]+",
    "VIEW": r"(masked|pairs)-[a-z0-9-]+",
    "NNN": r"\d{3}",
    "STEP": r"\d{8}",
    "FILE": r".+",
}

HEAD = """\
# The format on disk

<!-- Made by tests/lib/testlib/pages/format_page.py from the code that writes a cache. -->

What stands in a cache, a student's folder and a checkpoint, file by file and column by column. You do not need it to use
Rekindle: [from_python.md](from_python.md) reads a cache in a few lines. Read it if you write a reader of your own, or want to
know what a damaged file was.

A cache is a folder of **Arrow IPC files** (the *file* format, with a footer; never the stream format, of which a truncated copy
still reads as valid) and of small JSON files. pyarrow, polars, DuckDB and `datasets` read the shards without Rekindle. There are
no pickles and no half-precision floats in it. This page describes the format versions 1 to {newest}.
"""

FILES = {
    "cache.json": "the manifest: the format version, and a summary that can be made again from the rest",
    "corpus/corpus.json": "what decides the corpus: its configuration, the source files (size, checksum of samples), facts of the tokenizer",
    "corpus/growth-NNN.json": "the same of each addition, where a corpus has grown",
    "corpus/complete.json": "how many shards the corpus has; written when the last one is there",
    "corpus/complete-NNN.json": "the same after each addition",
    "corpus/tokenizer.json": "the sha256 of each file of the tokenizer",
    "corpus/tokenizer/FILE": "the tokenizer itself, as `save_pretrained` writes it",
    "corpus/data/UNIT-ATTEMPT.arrow": "a shard of the corpus, one row a sequence",
    "corpus/commits/UNIT.json": "its commit record",
    "views/VIEW/view.json": "what decides a view: masks or pairs, seed, tokenizer",
    "views/VIEW/data/UNIT-ATTEMPT.arrow": "a shard of the view, row for row beside the corpus shard of the same number",
    "views/VIEW/commits/UNIT.json": "its commit record",
    "targets/TEACHER/teacher.json": "what decides a teacher's targets ([below](#teacherjson))",
    "targets/TEACHER/head.safetensors": "of `hidden` targets: the output matrix, float32 `weight` [V, H] and perhaps `bias` [V]",
    "targets/TEACHER/head.json": "its sha256, the factor on the logits and their soft cap",
    "targets/TEACHER/data/UNIT-ATTEMPT.arrow": "a unit of targets, row for row beside the corpus shard of the same number",
    "targets/TEACHER/commits/UNIT.json": "its commit record",
    "targets/TEACHER/extensions/PART/FILE": "a larger k or further temperatures: a `teacher.json`, `data/` and `commits/` of their own",
    "FILE/records.arrow": "beside a `commits/` of 1,024 records or more: a roll-up of them, so that they need not all be read",
    "FILE/records.json": "its checksum",
}

AFTER_FILES = """
`UNIT` is the number of the corpus shard (`00000`, five digits or more) and, where a teacher is shown masks, the replica:
`00000-r000`. `ATTEMPT` is eight random hexadecimal digits: two processes that make the same unit never write the same file. A
data file is never overwritten, and **proves nothing by itself**: only one that a commit record names belongs to the cache.
Others are left by killed processes; `pipeline gc` removes them.
"""

SEALS = """\
Every JSON file that describes something is **sealed**: it ends with `format_version` and `record`, the checksum of all its
other keys. A flipped byte is found when the file is read.

A unit is done when its **commit record** exists. The writer first writes the data file, syncs it to the disk, and then creates
`commits/UNIT.json` exclusively (locally by a hard link, in a store by a conditional put): of two writers one wins, and the other
removes its file. Whoever resumes computes what the plan has and the records lack.
A shard is a file of record batches of {rows} rows (fewer in the codec `compact`); all but the last are full. The record says:
"""

RECORD = {
    "unit": "the unit, as in the record's own name",
    "path": "its data file, relative to the folder that holds `commits/`",
    "rows": "rows of the file, those of the corpus shard",
    "bytes": "its size",
    "sha256": "of the whole file; `pipeline verify` compares it",
    "regions": "`[offset, length, xxh3]` of the schema, each record batch and the footer; each is checked when it is first touched",
    "facts": "what its owner counts (below)",
    "rows_per_batch": "rows of each record batch but the last; left out where it is the usual number",
    "record": "the checksum of all other keys",
}

AFTER_RECORD = """
Facts of a corpus shard: `tokens`, `domains` (sequences of each), `next` (where the next shard begins in the source); of pairs and
dialogues also what was cut, and how many tokens are trained. Facts of targets: `positions`, `tokens`, `shard`, `replica`,
`corpus_sha256` (the shard they belong to), `scalars` (a checksum over digests, positions and scalars, so that these can be
trusted alone), `seconds`; of a teacher of another tokenizer also `mappable` and `mapped_mass`.

`records.arrow` has a row for each commit record, and a column for each fact that is a number:
"""

ROLL_UP = {
    "key": "shard and replica as one number, in the order of units",
    "unit": "the unit's name",
    "state": "of the record, as the store listed it (an ETag)",
    "rows": "as in the record",
    "bytes": "as in the record",
    "sha256": "as in the record",
}

AFTER_ROLL_UP = "\nThe records are the proof: a roll-up can be removed at any time.\n"

WHEN = {
    "token_types": "the corpus is of pairs",
    "trained": "something is only read: dialogues, rows of tokens",
}

CORPUS = {
    "digest": "a hash of the sequence: every row of a view and of targets repeats it",
    "input_ids": "the tokens, special ones included, without padding",
    "char_starts": "for each token its first character in `text`; −1 for special tokens",
    "word_starts": "whether the token begins a word",
    "document_starts": "where each document of the row begins",
    "document": "the id of the (first) document",
    "domain": "its domain, or null",
    "span_start": "first character of the sequence in its document",
    "span_end": "one past the last",
    "text": "the text itself, for teachers with a tokenizer of their own",
    "bucket": "a hash of the document: decides what is held out",
    "token_types": "segment ids",
    "trained": "whether the token is learnt by any loss",
}

AFTER_CORPUS = """
The schema's metadata has one key, `rekindle`: JSON that says what the shard holds, of which corpus, shard and format version.
So each shard describes itself, and one that was exchanged for another is refused.
"""

BEFORE_VIEWS = """\
What a model is shown, where that is not the corpus as it stands (`clean`, `text`: they have no files). The name ends with a
fingerprint of all that decides the bytes, so equal names mean equal inputs.
"""

VIEWS = {
    "masked": "a replica of masks, drawn, or taken from a teacher's losses (`mask.policy: hard`)",
    "pairs": "two texts for each sequence that has them (`pairs: adjacent`, `same-document`, `random`, or those of a record)",
}

OF_VIEWS = {
    "masked": {
        "digest": "of the sequence",
        "positions": "the masked positions, rising",
        "input_ids": "the ids that stand there instead: mostly the mask token",
    },
    "pairs": {
        "digest": "of the sequence",
        "text_a": "the first text; null where the sequence has no pair",
        "text_b": "the second",
        "input_ids": "both, in the tokens of the corpus",
        "token_types": "their segment ids",
    },
}

BEFORE_TARGETS = """\
There is one row for each sequence of the corpus shard, in its order. The first column repeats the sequence's digest, and a row whose
digest differs from the corpus's is an error. All other columns are lists with one entry for each position that has a
target (none where the teacher has none for the sequence). Letters: V tokens of the vocabulary, K candidates, T stored temperatures,
C classes, H hidden size. A log-probability is in nats; "1/1024 nat" means that the integer is to be divided by 1,024.
"""

KINDS = {
    "topk": (
        "The K likeliest ids of each position, by falling probability, and the mass outside them at each temperature. To read a "
        "row at temperature τ: form the softmax over the K values, divided by τ, and multiply it by the kept mass that "
        "`tail_log_odds` states. The row then sums to 1 with its tail, and nothing is found by subtraction."
    ),
    "threshold": "An unbiased sample of exactly K ids, at one temperature: nothing lies outside.",
    "random": "K draws with replacement, as counts. The lists of `ids`, `ids_high` and `counts` have `distinct` entries for each position.",
    "dense": "Every log-probability.",
    "hidden": "The last hidden states, times the matrix in `head.safetensors`.",
    "tails": "An extension of `topk`: the mass outside the ids of another part, at further temperatures.",
    "sequence": "Classifiers and regressors of whole sequences or pairs: one target a row, null where there is none.",
    "token": "Token classifiers, at the first token of each word.",
    "embedding": "Sentence encoders: one vector a row, null where there is none.",
}

CODECS = {
    "precise": "Values of 16 bits with a fixed step, instead of 8 bits over the row's range.",
    "compact": (
        "The integers of `default`, rearranged into byte streams so that zstd packs them, and record batches of about 4,096 "
        "positions. Nothing is lost. `data/targets/codec_compact.py` says how each stream is formed."
    ),
}

TARGETS = {
    "digest": "of the sequence",
    "positions": "where the target is; of a causal model position t is about token t + 1",
    "ids": "the low 16 bits of the token ids",
    "ids_high": "the bits above, one plane of bits for each",
    "values": "255·(lp₁ − lp)/(lp₁ − lp_K): linear in the log-probability",
    "log_prob_max": "−lp₁, of the likeliest kept id, in 1/1024 nat",
    "log_prob_min": "−lp_K, of the least likely kept id, in 1/1024 nat",
    "tail_log_odds": "log(kept mass / mass outside) at each temperature, in 1/1024 nat; 32,767: nothing lies outside",
    "gold_log_prob": "−log p of the true token, in 1/1024 nat",
    "gold_rank": "how many tokens are likelier than the true one",
    "entropy": "of the whole distribution, in 1/1024 nat",
}

OF_KINDS = {
    "random": {
        "distinct": "how many ids were drawn",
        "ids_high": "bits 16 and above of each id",
        "counts": "how often each was drawn",
    },
    "dense": {"log_probs": "of all V tokens at τ = 1"},
    "hidden": {"hidden": "the state, times `hidden_scale`", "hidden_scale": "of the position"},
    "sequence": {
        "logits": "of each class, or scores",
        "mc_probs": "mean probabilities of Monte-Carlo passes, if there are any",
    },
    "token": {"logits": "of each class"},
}

OF_CODECS = {
    "precise": {"values": "(lp₁ − lp) in 1/2048 nat; 65,535: 32 nats or more"},
    "compact": {
        "ids_table": "the ids that occur at least four times in the record batch",
        "ids_class": "for each candidate the class of its place in that table",
        "ids_rest": "the rest of the place, as a stream of bits",
        "values_head": "differences between neighbouring values, the first eight (K where it is less)",
        "values_rest": "the other differences (left out where K is at most 8)",
        "scalars_low": "low bytes of `log_prob_max`, `log_prob_min`, `entropy` and the tails",
        "scalars_high": "high bytes of the first three",
        "tails_high": "high bytes of the tails",
        "small": "differences of positions, gold log-probabilities and ranks",
    },
}

BEFORE_TEACHER = "What decides the targets; two runs whose keys agree (but for those marked *informative*) are the same teacher.\n"

TEACHER = {
    "name": "the folder's name, and the teacher's in run files",
    "task": "what it predicts",
    "kind": "how much is kept, as above",
    "view": "what it was shown",
    "vocabulary_size": "V, of the corpus's tokenizer",
    "k": "K",
    "temperatures": "those whose tails are stored, or that a sample was drawn at",
    "num_labels": "C",
    "label_names": "the classes' names",
    "problem": "of a classifier: one label, several labels, or scores",
    "domains": "the domains it was run on; null: all",
    "monte_carlo_passes": "how many dropout passes `mc_probs` is the mean of",
    "seed": "of those passes and of samples",
    "precision": "fp32, bf16 or fp16",
    "estimator": "the kind, and whether it is exact, biased or unbiased; of derived tails that they are derived",
    "codec": "how candidates are stored",
    "rows_per_batch": "rows of a record batch",
    "hidden_size": "H",
    "part": "the name of an extension; empty for the teacher itself",
    "extends": "of `tails`: the part whose ids they belong to",
    "fingerprints": "of weights, configuration and tokenizer",
    "versions": "of packages (*informative*)",
    "model": "where it was loaded from (*informative*)",
    "lineage": "of a student that became a teacher: the runs that made it (*informative*)",
    "mapped": "of a teacher with another tokenizer: how many tokens have a counterpart",
    "imported": "of targets that were made elsewhere: their provenance, and which scalars they lack",
    "served": "of a teacher that a server runs: its name there and the probes it is known by",
}

BEFORE_VERSIONS = """\
The version stands in `cache.json`. A cache takes the lowest version that says all that is in it, and is raised before
anything is written that an older Rekindle would misread. All versions are read; the first run of stage 1 that may add to a cache of
version 1 or 2 raises it to 3. From version 4 on a version says "at least": a cache of version 8 may have what 4 to 7 have.
"""

VERSIONS = {
    1: ("was made by the first Rekindle", "–"),
    2: (
        "was made before documents ended with the tokenizer's end-of-text token",
        "descriptions and the tokenizer's files are sealed; the schema has a checksum of its own",
    ),
    3: (
        "usually",
        "the corpus records end-of-text tokens and holes in the vocabulary; a teacher's vocabulary is the corpus's",
    ),
    4: ("has imported targets", "they may lack scalars, and have other provenance than weights"),
    5: ("has a roll-up of commit records", "an older repair would leave the roll-up as it was"),
    6: ("has dialogues or rows of tokens", "it would train on tokens that are only read"),
    7: ("has a teacher that a server ran", "it knows no probes"),
    8: ("has several documents in a row", "it would let a document see its neighbours"),
    9: ("has a teacher of another tokenizer", "it takes a position without a target for damage"),
    10: (
        "is being changed by `pipeline teachers`; then what it was before",
        "it would see half of the change",
    ),
}

BEFORE_RUN = "What `pipeline train-student --out RUN` writes. The folder is a Hugging Face model with a few files beside it.\n"

RUN_FILES = {
    "config.json": "the model's configuration",
    "model.safetensors": "its weights (of large ones `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`)",
    "tokenizer.json": "the tokenizer; `tokenizer_config.json` and other files beside it",
    "tokenizer_config.json": "as above",
    "heads.safetensors": "the task heads, and parameters of methods",
    "prompts.safetensors": "domain prompts, if there are any",
    "rekindle_student.json": "the student's task, its heads with their label names, its lineage",
    "README.md": "a model card",
    "run.json": "what decides the run: configuration, cache, student; `--resume` compares it",
    "run.yaml": "the resolved configuration, written last: the run is finished",
    "summary.json": "steps, seconds, held-out values, coverage, the best checkpoint",
    "metrics.jsonl": "a line for each step (`kind: train`) and each evaluation (`kind: evaluate`)",
    "wandb.id": "what the run is called at Weights & Biases (`mlflow.id`: at MLflow), so that a resumed run goes on there",
    "growth.json": "what `student.grow` changed, if it did",
    "stopped-at-step-STEP.json": "the examples of a step whose loss was no number, or exploded",
    "tensorboard/FILE": "the same numbers for TensorBoard",
    "checkpoints/step-STEP/trainer.json": "sealed: the step, the position in the data, the configuration, and the sha256 of every file",
    "checkpoints/step-STEP/optimizer.safetensors": "AdamW's moments (of large ones in several files)",
    "checkpoints/step-STEP/FILE": "the model at that step, as above: `from_pretrained` loads it",
}

AFTER_RUN = """
A checkpoint is written beside its place and renamed when it is whole; `trainer.json` is written last and has the digest of every
other file. A resumed run takes the newest checkpoint whose digests are right. An adapter (`student.lora`) has `adapter_config.json` and
`adapter_model.safetensors` in place of the model. In an object store a checkpoint counts once its record
`checkpoints/step-STEP.json` is there ([stores.md](stores.md#runs)).
"""
