// Tooltips: of whatever has data-tip.
(() => {
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", event => {
    const text = event.target.getAttribute && event.target.getAttribute("data-tip");
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const right = event.clientX + tip.offsetWidth + 20 > innerWidth;
    tip.style.left = Math.max(4, event.clientX + (right ? -tip.offsetWidth - 12 : 14)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)) + "px";
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
