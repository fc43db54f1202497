"""Operations on real clusters."""
