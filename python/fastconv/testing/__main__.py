"""python -m fastconv.testing KERNEL PROBLEM: one kernel on one problem, as a failing test prints it."""

from __future__ import annotations

import argparse
import sys

from fastconv.testing import fill, harness, problems

FILLS = {
    f.__name__: f
    for f in (
        fill.normal,
        fill.integers,
        fill.integers_with_zeros,
        fill.with_specials,
        fill.mostly_minus_infinity,
        fill.with_one_nan,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastconv.testing", description="Run one kernel on one problem.")
    parser.add_argument("kernel", help="full name, e.g. conv2d_fwd.direct.f32.avx2")
    parser.add_argument("problem", type=problems.parse, help="problem id, e.g. n1c8h7w7k16r3s3u1p1d1g1-nhwc")
    parser.add_argument("--fill", choices=FILLS, default="normal")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="integers: allow no error")
    parser.add_argument(
        "--place", choices=("heap", "low", "high"), default="heap", help="low, high: against a guard page"
    )
    parser.add_argument("--omit", action="append", default=[], help="operand that is not given, e.g. indices")
    args = parser.parse_args()
    try:
        harness.check(
            args.kernel,
            args.problem,
            FILLS[args.fill],
            exact=args.exact,
            threads=args.threads,
            place=args.place,
            omit=tuple(args.omit),
        )
    except (harness.KernelFault, NotImplementedError) as fault:
        print(fault)
        return 1
    print(f"{args.kernel} on {args.problem}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
