"""The processor of a result is named so that two generations of one brand are told apart."""

from ufbert.runtime.machine import cpu_name, machine_facts

OLDER = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma\n\n"
NEWER = OLDER.replace("25", "26").replace("fma", "fma avx512f avx512_vnni avx512_bf16")


def test_two_generations_under_one_name_are_told_apart():
    assert cpu_name(OLDER + NEWER) == "AMD EPYC (family 25, model 1; AVX2)"
    assert cpu_name(NEWER) == "AMD EPYC (family 26, model 1; AVX-512, VNNI, bfloat16)"
    assert cpu_name("processor : 0\nmodel name : Some CPU\n") == "Some CPU"


def test_a_list_without_a_name_has_none():
    assert cpu_name("processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd\n") == ""
    assert machine_facts()["cpu"]
