"""Which words are still to come."""


def missing(words, text):
    def holds(word):
        return any(text[i : i + len(word)] == word for i in range(len(text) - len(word) + 1))

    return [word for word in words if not holds(word)]
