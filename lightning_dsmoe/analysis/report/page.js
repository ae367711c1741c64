// Titles of cells and tokens as a note that touch and arrow keys reach too.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);
  let shown = null;

  const hide = () => {
    if (!shown) return;
    shown.title = shown.dataset.title;
    shown.classList.remove("shown");
    shown = null;
    tip.textContent = "";
  };

  const show = (cell) => {
    hide();
    shown = cell;
    cell.dataset.title = tip.textContent = cell.title;
    cell.removeAttribute("title");
    cell.classList.add("shown");
    const box = cell.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.min(box.left, width - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
  };

  const point = (event) => {
    const cell = event.target.closest(".walk [title]");
    if (cell) show(cell);
    else if (event.target.closest(".shown") !== shown) hide();
  };
  document.addEventListener("pointerover", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("scroll", hide, { passive: true });

  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const group of document.querySelectorAll(".walk:has([title])")) {
    group.tabIndex = 0;
    group.addEventListener("blur", hide);
    group.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const cells = [...group.querySelectorAll("[title], .shown")];
      const next = cells.indexOf(shown) + step;
      show(cells[Math.max(0, Math.min(cells.length - 1, next))]);
    });
  }
})();
