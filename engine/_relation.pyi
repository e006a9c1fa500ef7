from cpmbee.plain.relation import RelationBuilder as RelationBuilder
from cpmbee.plain.relation import TokenLayout as TokenLayout
