"""Lists the studies: what each shows, and the commands that make its results."""

from simulations.studies import STUDIES


def main() -> None:
    """Prints a paragraph for each study."""
    for name, study in STUDIES.items():
        print(f"{name}: {study.about}", *(f"  {command}" for command in study.commands), sep="\n")
    print("\n`python -m simulations.studies.NAME --help` shows the settings of a study.")


if __name__ == "__main__":
    main()
