"""Words of children's books and speeches of the nineteenth century, as several tasks need them."""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


WOMEN = listed(
    "Mary Anna Alice Clara Ellen Emma Fanny Grace Harriet Jane Julia Kate Laura Lucy Martha Nancy Polly Rose "
    "Sarah Sophy Susan Agnes Bessie Dora Esther Hannah Helen Ida Nora Ruth"
)
MEN = listed(
    "Tom John Peter Henry Charles Edward Frank Fred Harry Hugh Jack James Joseph Mark Martin Michael Oliver "
    "Philip Ralph Richard Robert Sam Simon Stephen Walter William Adam Ben Daniel David"
)
TOWNS = listed(
    "London Dover Oxford Bristol Norwich Exeter Plymouth Durham Rome Venice Naples Vienna Berlin Geneva Lisbon "
    "Madrid Boston Edinburgh Dublin Moscow Cairo Athens Hamburg Genoa Calais Portsmouth Southampton Canterbury "
    "Winchester Cambridge"
)
TRADES = listed(
    "baker miller tailor farmer sailor soldier teacher doctor shepherd fisherman gardener carpenter blacksmith "
    "merchant painter servant hunter captain clerk cook weaver butcher coachman printer judge lawyer bishop "
    "musician poet nurse"
)
KINDS = {  # a word for all, and some of them; their plural is with -s
    "bird": listed("sparrow swallow raven robin crow owl eagle lark pigeon gull"),
    "animal": listed("horse cow goat donkey bear rabbit dog cat pig lamb"),
    "tree": listed("oak pine elm willow maple palm poplar cedar"),
    "flower": listed("rose violet tulip primrose snowdrop bluebell"),
}
NUMBERS = listed("no one two three four five six seven eight nine ten eleven twelve")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
THINGS = listed(
    "kettle basket lantern ladder blanket clock chair table mirror candle bottle ribbon bonnet coat saddle "
    "whistle drum fiddle spoon barrel trunk chest carpet wheel rope bucket needle umbrella purse ring watch sword "
    "pistol cradle bell book picture"
)
COLOURS = listed("red green blue white black brown yellow grey golden silver")
TRAITS = listed(
    "old young tall little poor rich merry sad quiet proud kind lazy brave clever foolish gentle honest hungry "
    "tired lame"
)
NUMBERED = listed("two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty")
