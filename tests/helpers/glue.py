"""GLUE's files, a few lines each."""

_MNLI_TESTS = ("test_matched.tsv", "test_mismatched.tsv")


def _same_text(*lines, names=("train.tsv", "dev.tsv")):
    return dict.fromkeys(names, "".join(lines))


# Lines by hand in the official formats. MRPC begins with a byte-order mark, CoLA has no header but in its
# test file, quotes mean nothing, QQP has lines cut short.
GLUE_FILES = {
    "CoLA": {
        "train.tsv": "gj04\t1\t\tOur \"friends won't buy it.\nks08\t0\t*\tHim left.\n",
        "dev.tsv": "gj04\t1\t\tThe sailors rode.\n",
        "test.tsv": "index\tsentence\n0\tBill whistled past the house.\n1\tThe car honked.\n",
    },
    "SST-2": {
        "train.tsv": "sentence\tlabel\nhide new secretions \t0\nlovely \t1\n",
        "dev.tsv": "sentence\tlabel\nit 's charming \t1\n",
    },
    "MRPC": _same_text(
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n",
        '1\t1\t2\tHe said "no.\tHe said: "No".\r\n0\t3\t4\tA.\tB.\r\n',
    ),
    "STS-B": _same_text(
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n",
        "1\tmain\tMSRvid\t2012\t0004\tnone\tnone\tA man.\tA flute.\t3.800\n",
    ),
    "QQP": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "133273\t1\t2\tHow?\tHow is it?\t1\n7\t3\t4\tcut short\n402555\t5\t6\tWhy?\tWhen?\t0\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n201359\t1\t2\tA?\tB?\t0\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\tOne?\tTwo?\n1\tcut short\n2\tX?\tY?\n",
    },
    "MNLI": {
        name: "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        f"0\t1\t1n\tfiction\tConceptually, {name}.\tProduct.\tneutral\tneutral\n"
        "1\t2\t2e\tfiction\tYou know.\tYes.\tentailment\tentailment\n"
        "2\t3\t3c\tfiction\tUp.\tDown.\tcontradiction\tcontradiction\n"
        for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")
    }
    | _same_text("index\tgenre\tsentence1\tsentence2\n0\tfiction\tUp.\tDown.\n", names=_MNLI_TESTS),
    "diagnostic": {"diagnostic.tsv": "index\tsentence1\tsentence2\n0\tThe cat sat.\tThe cat did not sit.\n"},
    "QNLI": _same_text(
        "index\tquestion\tsentence\tlabel\n",
        "0\tWhat?\tThat.\tentailment\n1\tWho?\tShe.\tnot_entailment\n",
    ),
    "RTE": _same_text(
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tNo.\tYes.\tnot_entailment\n1\tA.\tA.\tentailment\n",
    ),
    "WNLI": _same_text(
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tI stuck a pin.\tIt had a hole.\t0\n1\tA.\tA.\t1\n",
    ),
}
