"""The words of a case file, and its method in plain words."""

CASE_WORDS = [
    (
        "Client, update",
        "A participant, and what it sent in one round: its locally trained model minus the global model.",
    ),
    ("Recording", "The updates of all clients, round by round, as the server received and sealed them."),
    (
        "Accused, ambiguous",
        "Accused: stands out more than innocent clients do. Ambiguous: stands out as much, but its number of examples, "
        "or labels of one kind only, may explain it.",
    ),
    ("Next in line", "The most suspicious client that is neither accused nor ambiguous."),
    ("Clean clients", "Those that are neither accused nor ambiguous; the others are judged by them."),
    (
        "Score, threshold",
        "A number per client over the whole recording, higher = more suspicious. A client whose score exceeds the "
        "threshold is accused, unless something innocent explains it.",
    ),
    (
        "p",
        "How often a recording without any attack holds a client at least so conspicuous. 0.05 is one in twenty. It is "
        "not the chance that a client is innocent.",
    ),
    (
        "Rate",
        "The share of recordings without an attack in which anybody at all is accused: what is accepted as error.",
    ),
    ("q", "p adjusted for how many recordings were investigated (Benjamini and Yekutieli)."),
    (
        "Null, attack-free recordings",
        "Recordings in which nobody attacks. A verdict is worth what the recordings are worth it is compared with.",
    ),
    ("Sigma", "A robust standard deviation: how far clean clients typically are from their middle."),
    ("Activity", "How far a client's update of a round goes along with what it sent in its other rounds."),
    (
        "AUC, effect",
        "AUC: chance that an update of the accused is more unusual than one of the others; 0.5 is a coin toss. Effect: "
        "by how many sigmas.",
    ),
    (
        "Main accuracy, attack success rate",
        "Share of held-out samples that the model labels correctly, and of those that an attack is meant to change "
        "that get the attacker's label.",
    ),
    ("Head", "A fingerprint (SHA-256) of the whole recording. Any change of the evidence changes it."),
]

METHOD = (
    "Each client's updates are summed up over all rounds, and some forty readings are taken of them: how large they "
    "are, how alike those of others, how far apart from most, also once the client's labels are accounted for.",
    "Each reading is compared with those of the clients thought clean, at first everybody. A score adds the readings "
    "up; how much each counts was learned from simulated recordings with and without attacks.",
    "The most conspicuous client is taken out and everything is computed anew, since an attacker makes innocent "
    "clients look odd, and so on to 45 % of the clients. The same is done with recordings in which nobody attacks. "
    "Accused are those who come higher than these allow, also when they are put back alone.",
    "Where more than a quarter of the clients stand apart from the others, either side may be the honest one. They are "
    "accused only if they, seen from the others, look more like attackers than the reverse; else nobody is.",
    "Whoever claims many more or fewer examples than others, or seems to have a single label, differs without guilt. "
    "What examples explain is taken off; clients who then no longer stand out are called ambiguous.",
    "The error rate is that of recordings without an attack. While somebody attacks, innocent clients react to it, and "
    "how often they are accused was measured, not guaranteed.",
)
