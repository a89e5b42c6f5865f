"""Libraries in Java and Kotlin."""

from __future__ import annotations

from pathlib import Path

from tests.libraries import code_block
from tests.libraries.building import Project, program

TOOLCHAINS = {
    "javac": "on Debian, as root: apt-get install openjdk-17-jdk-headless",
    "mvn": "on Debian, as root: apt-get install maven",
}

PROJECT = Project(
    Path(__file__).parent,
    commands=[("mvn", "--batch-mode", "--quiet", "process-classes")],
    recipes={
        "src/GatewayQueue.java": code_block("Java"),
        "src/AskingController.java": code_block("JDA"),
        "src/AskingCoordinator.java": code_block("Discord4J"),
        "src/HttpQueue.kt": code_block("kord"),
    },
    variables={},
)
# One tier of compilation and a small heap: four of them start at the same time.
JAVA = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m")
CLASSES = ("-cp", "target/classes:target/dependency/*")
JDA = program("JDA", PROJECT, *JAVA, *CLASSES, "JdaBot")
DISCORD4J = program("Discord4J", PROJECT, *JAVA, *CLASSES, "Discord4jBot")
KORD = program("kord", PROJECT, *JAVA, *CLASSES, "BotKt")
